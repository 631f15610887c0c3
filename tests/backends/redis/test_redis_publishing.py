"""What a batch looks like in the streams, whatever its messages hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sagacity.backends.redis import RedisBus
from sagacity.core.delivery import Envelope
from sagacity.core.errors import BusError
from sagacity.testing.conformance.bus import ids, ids_of, message, messages, read_all
from tests.test_codec import FULL

pytestmark = pytest.mark.asyncio

Command = Callable[..., Awaitable[Any]]


async def test_entries_are_flat_fields_that_everybody_can_read(
    redis_url: str, command: Command
) -> None:
    async with RedisBus(redis_url) as bus:
        await bus.publish([FULL, Envelope(id="m", type="t", topic="notes")])
        (_, full), (_, least) = await command(redis_url, "XRANGE", "sagacity:notes", "-", "+")
    assert full == {
        b"specversion": b"1.0",
        b"id": b"m",
        b"type": b"notes.Noted",
        b"time": b"2027-01-15T08:00:00.123456Z",
        b"kind": b"command",
        b"source": b"shop",
        b"subject": b"Order/7",
        b"correlationid": b"c",
        b"causationid": b"d",
        b"actor": "ann \u00e9".encode(),
        b"sagatype": b"Trip",
        b"sagakey": b"t",
        b"sagauid": b"u",
        b"replyto": b"replies",
        b"inreplyto": b"r",
        b"undoes": b"x",
        b"traceparent": b"00-1-2-01",
        b"tracestate": b"k=v",
        b"dataversion": b"3",
        b"hops": b"4",
        b"sequence": b"9",
        b"replytopics": b"a,b",
        b"data": b'{"book":"b"}',
    }
    assert least == {
        b"specversion": b"1.0",
        b"id": b"m",
        b"type": b"t",
        b"time": b"1970-01-01T00:00:00Z",
        b"data": b"{}",
    }


@pytest.mark.parametrize("size", [31, 32, 255, 256, 16_000, 60_000])
@pytest.mark.parametrize("text", ["x", "\u00e9", "\U0001f600", '"'])
async def test_header_of_any_length_arrives_as_it_was(redis_url: str, size: int, text: str) -> None:
    actor = (text * size)[: size // len(text.encode())]
    sent = Envelope(id="m", type="t", topic="notes", actor=actor)
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["notes"])
        await bus.publish([sent])
        (got,) = await read_all(subscription, 1)
        assert got.envelope == sent
        await subscription.ack([got])


@pytest.mark.parametrize(
    "body", [b"", b"\x00", b"\xff\xfe", b"\r\n$3\r\n", bytes(range(256)) * 500]
)
async def test_body_of_any_bytes_arrives_as_it_was(redis_url: str, body: bytes) -> None:
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        await bus.publish([message(1, body=body), message(2)])
        first, second = await read_all(subscription, 2)
        assert first.envelope == message(1, body=body)
        assert second.envelope == message(2)
        await subscription.ack([first, second])


async def test_topics_mixed_in_one_batch_keep_their_orders(redis_url: str) -> None:
    topics = [f"topic{number}" for number in range(20)]
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", topics)
        await bus.publish([message(number, topics[number * 7 % 20]) for number in range(2000)])
        found = await read_all(subscription, 2000, limit=500)
        for place, topic in enumerate(topics):
            own = [delivery for delivery in found if delivery.topic == topic]
            assert ids(own) == [
                f"{topic}-{number}" for number in range(2000) if number * 7 % 20 == place
            ]


async def test_one_message_too_large_stops_the_batch_before_anything_is_sent(
    redis_url: str, command: Command
) -> None:
    def sized(size: int) -> Envelope:
        return message(1, body=b"x" * size)

    async with RedisBus(redis_url, payload_bytes_max=1000) as bus:
        await bus.publish([sized(1000)])
        with pytest.raises(BusError, match=r"has a body of 1001 bytes \(\d+ with its headers\)"):
            await bus.publish([*messages(3), sized(1001)])
        frame = Envelope(id="m", type="t", topic="orders", body=b"x" * 1000)
        fields = "specversion1.0idmtypettime1970-01-01T00:00:00Zactordata"
        room = 64 * 1024 - len(fields)  # the rest of the entry beside the body
        for actor in ("x" * room, "\u00e9" * (room // 2)):
            await bus.publish([with_actor(frame, actor)])
            with pytest.raises(BusError, match="has a body of 1000 bytes"):
                await bus.publish([with_actor(frame, actor + "xx")])
        assert await command(redis_url, "XLEN", "sagacity:orders") == 3
        await bus.publish(messages(2))
        subscription = await bus.join("g", "c", ["orders"])
        found = await read_all(subscription, 5)
        assert not any(delivery.fault for delivery in found)
        assert ids(found)[-2:] == ids_of(messages(2))


def with_actor(envelope: Envelope, actor: str) -> Envelope:
    return Envelope(
        id=envelope.id, type=envelope.type, topic=envelope.topic, body=envelope.body, actor=actor
    )
