"""Three processes publish the same lanes at once, each by worker and relay, while Redis is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from typing import cast

import msgspec
import pytest
import redis.asyncio

from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.codec import from_fields
from sagacity.core.delivery import Envelope
from sagacity.core.plan import OutboxRow
from tests.waiting import async_eventually
from tests.worker.lanes import Begin, End, Tick, out_of_order
from tests.worker.running import Site, envelope, site

pytestmark = pytest.mark.asyncio

LANES, KILLS, TICKS = 12, 4, 7


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_first_occurrences_stay_in_order(
    postgres_url: str, private_redis: EmbeddedRedis
) -> None:
    """G5, after protocol.md M21: Redis is killed and one process of three, again and again."""
    async with site(postgres_url, private_redis.url) as place:
        with ExitStack() as running:
            workers = [_start(running, place, f"w{n}") for n in range(3)]
            await place.store.append([_row(Begin(f"l{n}")) for n in range(LANES)])
            await async_eventually(lambda: _begun(place), "all lanes have begun", 60)
            for round_ in range(KILLS):
                for _ in range(TICKS):
                    await place.store.append([_row(Tick(f"l{n}")) for n in range(LANES)])
                some = partial(_sent, place, round_ * LANES)
                await async_eventually(some, "some of it was sent", 60)
                victim = round_ % 3
                workers[victim].kill()
                await asyncio.to_thread(workers[victim].wait)
                private_redis.kill()
                await asyncio.to_thread(private_redis.start)
                workers[victim] = _start(running, place, f"w{victim}")
            await async_eventually(
                lambda: _sent(place, KILLS * TICKS * LANES * 2), "all was sent", 90
            )
            await place.store.append([_row(End(f"l{n}")) for n in range(LANES)])
            await place.quiet(completed=LANES, seconds=60)
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.close()
            assert [await asyncio.to_thread(w.wait, 30) for w in workers] == [0, 0, 0]
        published = await _steps(private_redis.url)
    firsts = list({one.id: one for one in published}.values())
    assert len(firsts) == KILLS * TICKS * LANES * 2
    assert len(published) > len(firsts), "nobody published what another did, so nothing was tried"
    assert out_of_order(published) == []
    # The checker sees it where two commands of a lane have changed places.
    lane = [n for n, one in enumerate(firsts) if one.saga_key == "l3"]
    firsts[lane[5]], firsts[lane[9]] = firsts[lane[9]], firsts[lane[5]]
    assert out_of_order(firsts) == ["l3"]


def _row(event: Begin | Tick | End) -> OutboxRow:
    return OutboxRow("", envelope(event))


def _start(running: ExitStack, place: Site, consumer: str) -> subprocess.Popen[bytes]:
    process = running.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker.lanes", place.store_url, place.bus_url, consumer],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    )
    running.callback(process.kill)
    return process


async def _begun(place: Site) -> bool:
    return (await place.store.counts())["sagas.running"] == LANES


async def _sent(place: Site, goal: int) -> bool:
    instances = [await place.store.saga("Lane", f"l{n}") for n in range(LANES)]
    sent: list[int] = [msgspec.json.decode(one.data)["sent"] for one in instances if one]
    return sum(sent) >= goal


async def _steps(url: str) -> list[Envelope]:
    client = redis.asyncio.Redis.from_url(url)
    try:
        entries = await client.xrange("sagacity:steps")
    finally:
        await client.aclose()
    return [from_fields("steps", cast("dict[bytes, bytes]", fields)) for _, fields in entries or ()]
