"""The relay where the bus refuses something, and where rows that have left cannot be forgotten."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping

import anyio
import pytest
from redis.asyncio import Redis

from sagacity import Event
from sagacity.backends.sql import SqlStore
from sagacity.core.plan import OutboxRow, Plan
from sagacity.worker.relay import Relay
from tests.worker.running import envelope, site

pytestmark = pytest.mark.asyncio


class Refused(Event, topic="refused"):
    number: int


class Accepted(Event, topic="accepted"):
    number: int


@pytest.mark.parametrize("lane", ["one lane", ""])
async def test_what_the_bus_refuses_holds_up_its_own_lane_only(
    store_url: str, redis_url: str, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    """More rows than a sweep takes are refused, before everything else: the others leave, in order."""
    client = Redis.from_url(redis_url)
    await client.set("sagacity:refused", "this is no stream")
    async with site(store_url, redis_url) as place:
        refused = [OutboxRow(lane, envelope(Refused(n), f"r{n}")) for n in range(25)]
        accepted = [OutboxRow(f"lane{n % 2}", envelope(Accepted(n), f"a{n}")) for n in range(6)]
        await place.store.append([*refused, *accepted])
        relay = Relay(place.store, place.bus, place.store.clock, age_us=0, limit=10)
        with caplog.at_level(logging.ERROR, "sagacity.worker.relay"):
            assert await relay.sweep() == 6
        assert len(caplog.records) == 1
        reader = await place.bus.join("readers", "reader", ["accepted"])
        seen = [d.envelope.id for d in await reader.read(100, 0) if d.envelope is not None]
        assert sorted(seen) == [f"a{n}" for n in range(6)]
        assert [i for i in seen if int(i[1:]) % 2 == 0] == ["a0", "a2", "a4"]
        await reader.close()
        assert len(await place.store.pending(place.store.clock.now(), 100)) == 25
        await client.delete("sagacity:refused")
        while await relay.sweep():
            pass
        assert await client.xlen("sagacity:refused") == 25
        late = await place.bus.join("late", "reader", ["refused"])
        order = [d.envelope.id for d in await late.read(100, 0) if d.envelope is not None]
        await late.close()
        if lane:
            assert order == [f"r{n}" for n in range(25)]
    await client.aclose()


# --- rows that stay though they have left ------------------------------------------------------


class Sweeps:
    """An observer that notes when a relay swept."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def notice(self, name: str, attributes: Mapping[str, object]) -> None:
        del attributes
        if name == "relay.swept":
            self.at.append(time.monotonic())


class Thawed(Exception):
    """Ends a transaction without a commit."""


async def test_rows_that_somebody_holds_are_published_again_less_and_less_often(
    postgres_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that is frozen while it forgets them must not make a relay fill the bus with copies."""
    sweeps = Sweeps()
    async with site(postgres_url, redis_url) as place, Redis.from_url(redis_url) as client:
        other = SqlStore(postgres_url)
        rows = [OutboxRow("a lane", envelope(Accepted(n), f"m{n}")) for n in range(10)]
        seqs = [row.seq for row in await place.store.append(rows)]
        clock = place.store.clock
        relay = Relay(place.store, place.bus, clock, age_us=0, limit=10, observer=sweeps)
        async with anyio.create_task_group() as tasks:
            with pytest.raises(Thawed):
                async with other.transaction() as frozen:
                    await frozen.write(Plan(now=frozen.now), seqs)
                    tasks.start_soon(relay.run, 0.05)
                    await place.until(lambda: len(sweeps.at) >= 5, "five sweeps")
                    raise Thawed
            relay.notify()
            await place.quiet()
            relay.stop()
        await other.close()
        # After a full page the next one is taken at once; then come pauses of 0.1, 0.2 and 0.4 s.
        pauses = [later - sooner for sooner, later in itertools.pairwise(sweeps.at[1:5])]
        assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True))
        assert await client.xlen("sagacity:accepted") == 10 * len(sweeps.at)
        [warning] = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert "stay pending" in warning.getMessage()
