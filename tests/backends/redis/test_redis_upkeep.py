"""Trimming, consumers, large backlogs and the check of a server's settings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import pytest_asyncio

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.checks import unsafe_lines
from sagacity.backends.redis.connection import redacted
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.backends.redis.reader import READ_BYTES_MAX
from sagacity.core.errors import ConfigurationError
from sagacity.testing.conformance.bus import ids, ids_of, message, messages, read_all

Command = Callable[..., Awaitable[Any]]
KEY = "sagacity:orders"
HOUR_US = 3_600_000_000


@pytest_asyncio.fixture
async def bus(redis_url: str) -> AsyncGenerator[RedisBus]:
    async with RedisBus(redis_url) as bus:
        yield bus


# --- trimming ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_trim_keeps_what_any_group_may_still_need(
    bus: RedisBus, redis_url: str, command: Command
) -> None:
    await bus.publish(messages(1000))
    assert await bus.trim(["orders", "no such topic"], 0) == 0  # no group has joined: no reader yet
    fast, slow = await bus.join("fast", "c", ["orders"]), await bus.join("slow", "c", ["orders"])
    await fast.ack(await read_all(fast, 1000, limit=1000))
    assert await bus.trim(["orders"], 0) == 0  # the slow one has read nothing
    handed = await slow.read(900, 1000)
    while len(handed) < 900:
        handed += await slow.read(900 - len(handed), 1000)
    await slow.ack([*handed[:500], *handed[501:]])
    assert await bus.trim(["orders"], HOUR_US) == 0  # nothing is older than the retention
    gone = await bus.trim(["orders"], 0)
    assert 300 < gone <= 500  # whole nodes only, and never the pending entry or what follows it
    kept = await command(redis_url, "XRANGE", KEY, "-", "+")
    assert len(kept) == 1000 - gone
    assert handed[500].entry_id.encode() in {entry_id for entry_id, _ in kept}
    await slow.close()
    again = await bus.join("slow", "c", ["orders"])
    assert ids(await read_all(again, 101)) == ["orders-500", *ids_of(messages(100, start=900))]
    late = await bus.join("late", "c", ["orders"])
    assert len(await read_all(late, 1000 - gone)) == 1000 - gone


@pytest.mark.asyncio
async def test_trim_while_reading_loses_nothing(bus: RedisBus) -> None:
    subscription = await bus.join("g", "c", ["orders"])
    found: list[str] = []
    async with anyio.create_task_group() as tasks:

        async def publish() -> None:
            for start in range(0, 3000, 100):
                await bus.publish(messages(100, start=start))

        async def trim() -> None:
            while True:
                await bus.trim(["orders"], 0)
                await anyio.lowlevel.checkpoint()

        tasks.start_soon(publish)
        tasks.start_soon(trim)
        while len(found) < 3000:
            some = await subscription.read(70, 1000)
            await subscription.ack(some)
            found += ids(some)
        tasks.cancel_scope.cancel()
    assert found == ids_of(messages(3000))


# --- consumers -----------------------------------------------------------------------------------


async def consumers(command: Command, url: str) -> set[bytes]:
    return {row["name"] for row in await command(url, "XINFO CONSUMERS", KEY, "g")}


@pytest.mark.asyncio
async def test_consumer_goes_when_it_leaves_unless_something_is_pending(
    bus: RedisBus, redis_url: str, command: Command
) -> None:
    done, busy = await bus.join("g", "done", ["orders"]), await bus.join("g", "busy", ["orders"])
    await bus.publish(messages(2))
    await done.ack(await done.read(1, 1000))
    assert len(await busy.read(1, 1000)) == 1
    await done.close()
    await busy.close()
    assert await consumers(command, redis_url) == {b"busy"}
    assert await bus.forget_consumers("g", ["orders", "no such topic"], 0) == 0
    assert await consumers(command, redis_url) == {b"busy"}
    heir = await bus.join("g", "heir", ["orders"])
    await heir.ack(await heir.reclaim(0, 10))
    assert await bus.forget_consumers("g", ["orders"], HOUR_US) == 0  # not idle for long enough
    assert await bus.forget_consumers("no such group", ["orders"], 0) == 0
    assert await bus.forget_consumers("g", ["orders"], 0) == 2
    assert await consumers(command, redis_url) == set()
    await bus.publish([message(2)])
    assert ids(await read_all(heir, 1)) == ["orders-2"]  # who is still there goes on


# --- large backlogs ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_reclaim_finds_old_entries_behind_many_fresh_ones(
    bus: RedisBus, redis_url: str, command: Command
) -> None:
    busy, other = await bus.join("g", "busy", ["orders"]), await bus.join("g", "o", ["orders"])
    await bus.publish(messages(5000))
    handed = await read_all(busy, 5000, limit=1000)
    old = [delivery.entry_id for delivery in handed[-5:]]
    claim = ("XCLAIM", KEY, "g", "busy", 0, *old, "IDLE", 90_000, "JUSTID")
    await command(redis_url, *claim, parse_justid=True)
    # One XAUTOCLAIM COUNT 10 looks at 100 pending entries: it finds nothing 49 times.
    found = await other.reclaim(60_000, 10)
    assert [delivery.entry_id for delivery in found] == old
    assert await other.reclaim(60_000, 10) == []


@pytest.mark.asyncio
async def test_large_entries_are_read_in_smaller_numbers(redis_url: str, command: Command) -> None:
    size = 2_000_000
    async with RedisBus(redis_url, payload_bytes_max=size) as bus:
        subscription = await bus.join("g", "c", ["orders"])
        body = b'"' + b"x" * (size - 2) + b'"'
        for number in range(24):
            await bus.publish([message(number, body=body)])
        expected = 0
        while expected < 24:
            found = await subscription.read(1000, 1000)
            pending = (await command(redis_url, "XPENDING", KEY, "g"))["pending"]
            assert 0 < pending - expected <= 4 * READ_BYTES_MAX / size
            if expected:
                assert pending - expected <= READ_BYTES_MAX / size
            expected += len(found)
            assert expected == pending


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_check_says_what_is_unsafe(private_redis: EmbeddedRedis, command: Command) -> None:
    async with RedisBus(private_redis.url) as bus:
        assert await bus.check() == []
        await command(private_redis.url, "CONFIG SET", "maxmemory-policy", "allkeys-lru")
        await command(private_redis.url, "CONFIG SET", "appendonly", "no")
        first, second = await bus.check()
        assert "has maxmemory-policy allkeys-lru; expected noeviction" in first
        assert "has appendonly no; expected yes" in second
        assert private_redis.url in first


def test_old_versions_are_named() -> None:
    good = {"redis_version": "6.2.14", "maxmemory_policy": "noeviction", "aof_enabled": 1}
    assert unsafe_lines("here", good) == []
    for version in ("7.0.15", "8.0-rc1", "10.1"):
        assert unsafe_lines("here", {**good, "redis_version": version}) == []
    for version in ("6.0.16", "5.0.7", "2.8"):
        (line,) = unsafe_lines("here", {**good, "redis_version": version})
        assert line.startswith(f"Redis at here is version {version}; expected 6.2 or newer")


# --- URLs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pw@h:1/0", "redis://***@h:1/0"),
        ("rediss://user:p%40w@h:1/0?ssl_password=pw", "rediss://***@h:1/0?ssl_password=***"),
        ("unix://user:pw@/run/r.sock?password=pw&db=1", "unix://***@/run/r.sock?password=***&db=1"),
        ("redis+sentinel://u:pw@a:1,b:2/m/0?sentinel_password=pw", "redis+sentinel://***@a:1,b:2/m/0?sentinel_password=***"),
        ("redis://u:p@w@h", "redis://***@h"),
        ("redis://[::1", "(not a URL)"),
    ],
)  # fmt: skip
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "http://user:planted-secret@h",
        "localhost:6379",
        "",
        "redis+sentinel://:planted-secret@h:26379",
        "redis+sentinel://:planted-secret@h:port/m",
        "redis://:planted-secret@h:port",
        "redis://:planted-secret@[::1",
        "redis://:planted-secret@h/0?socket_timeout=soon",
        "redis://:planted-secret@h/0?no_such_option=1",
    ],
)
def test_unusable_urls_are_refused_without_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RedisBus(url)
    assert "bus URL" in str(caught.value)
    assert "planted-secret" not in str(caught.value)
