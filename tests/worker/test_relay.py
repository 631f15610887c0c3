"""The relay's sweep where the bus refuses something."""

from __future__ import annotations

import logging

import pytest
from redis.asyncio import Redis

from sagacity import Event
from sagacity.core.plan import OutboxRow
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
