"""What a message may cost beside its batch, counted in calls: a count does not depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, Self, cast

import pytest

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.connection import Connector
from sagacity.core.delivery import Envelope
from sagacity.ports import Subscription
from sagacity.testing.conformance.bus import messages


class Calls:
    """Counts the calls of Python functions, and of C functions from Python, within its context."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, _frame: object, event: str, _argument: object) -> None:
        self.count += event in {"call", "c_call"}


async def _calls(action: Callable[[], Awaitable[Any]]) -> int:
    with Calls() as calls:
        await action()
    return calls.count


async def _journey(bus: RedisBus, subscription: Subscription, sent: list[Envelope]) -> list[int]:
    async def read() -> None:
        while len(found) < len(sent):
            found.extend(await subscription.read(len(sent) - len(found), 1000))

    found: list[Any] = []
    published = await _calls(lambda: bus.publish(sent))
    taken = await _calls(read)
    acknowledged = await _calls(lambda: subscription.ack(found))
    return [published, taken, acknowledged]


@pytest.mark.asyncio
async def test_calls_for_each_message_are_few(redis_url: str) -> None:
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        await _journey(bus, subscription, messages(100))
        few = await _journey(bus, subscription, messages(100))
        many = await _journey(bus, subscription, messages(600))
    publish, read, ack = [(more - less) / 500 for more, less in zip(many, few, strict=True)]
    assert publish < 20
    assert read < 60
    assert ack < 4


@pytest.mark.asyncio
async def test_calls_for_a_message_that_comes_alone_are_few(redis_url: str) -> None:
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        await _journey(bus, subscription, messages(1))
        publish, read, ack = await _journey(bus, subscription, messages(1))
    # With redis-py's clients these are 400, 520 and 370.
    assert publish < 200
    assert read < 300
    assert ack < 200


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s", "redis+sentinel://h/m"])
def test_commands_are_packed_in_one_piece(url: str) -> None:
    for make in (Connector.shared, lambda connector: connector.dedicated(1)):
        client = make(Connector(url, timeout_s=5, connections_max=1, protocol=2))
        connection = cast("Any", client).connection_pool.make_connection()
        (packed,) = connection.pack_command("XINFO STREAM", "k", b"x" * 100_000, 7)
        assert packed.startswith(b"*5\r\n$5\r\nXINFO\r\n$6\r\nSTREAM\r\n$1\r\nk\r\n$100000\r\n")
        assert packed.endswith(b"\r\n$1\r\n7\r\n")
