"""A worker that is stopped at any moment: it returns in time, and what it held is found by others."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import redis.asyncio
from sqlalchemy import make_url

from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.ports import Due
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.servers.proxy import TcpProxy
from tests.worker.running import QUICK, Site, envelope, site
from tests.worker.shop import OrderPlaced, Poke, Shop

pytestmark = pytest.mark.asyncio


class _Gate(MemoryStore):
    """A store in which one question waits until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.open = anyio.Event(), anyio.Event()
        self.closed = False

    async def due(self, saga_types: Collection[str], limit: int) -> Due:
        due = await super().due(saga_types, limit)
        if self.closed and due.parked:
            self.asked.set()
            await self.open.wait()
        return due


def _worker(shop: Shop, store: MemoryStore, bus: MemoryBus, **settings: Any) -> Worker:
    return Worker(
        shop.service(),
        store,
        bus,
        Settings(store="memory:", bus="memory:", **{**QUICK, **settings}),
        consumer="w",
    )


async def test_a_stop_while_due_messages_are_being_found() -> None:
    """What is found due just after the stop is left alone, and nobody waits for it to be handled."""
    shop, store, bus = Shop(), _Gate(), MemoryBus()
    await store.prepare(create=True)
    worker = _worker(shop, store, bus, backoff_base_ms=20)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await bus.publish([envelope(OrderPlaced("o1"))])
            store.closed = True
            await bus.publish([envelope(Poke("o1", boom=True))])
            await store.asked.wait()
            worker.stop()
            store.open.set()


async def _live(
    place: Site, shop: Shop, name: str, ends: Callable[[int], bool], *, kill: bool
) -> int:
    """One worker that is told to end as soon as `ends` says so of the turns of the loop so far.

    Returns the turns. Fails if it does not end in time.
    """
    turns = 0
    store, bus = SqlStore(place.store_url), RedisBus(place.bus_url)
    changed: dict[str, Any] = {**QUICK, "lease_s": 1.0}
    settings = Settings(store=place.store_url, bus=place.bus_url, **changed)
    worker = Worker(shop.service(), store, bus, settings, consumer=name)
    before = asyncio.all_tasks()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            while not ends(turns):
                turns += 1
                await anyio.lowlevel.checkpoint()
            (worker.kill if kill else worker.stop)()
    assert not worker.ready
    await bus.close()
    await store.close()
    assert asyncio.all_tasks() <= before, "no task is left behind"
    return turns


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_workers_that_end_at_any_moment_lose_nothing(
    sqlite_url: str, redis_url: str, seed: int
) -> None:
    """Thirty workers, stopped or killed anywhere from their first turn on: all orders end well."""
    moments = random.Random(seed)
    shop = Shop()
    orders = 400
    async with site(sqlite_url, redis_url) as place:
        await place.publish(*(OrderPlaced(f"o{n}", n) for n in range(orders)))
        # How many turns it takes to get something done is another number on each machine.
        whole = await _live(place, shop, "first", lambda _: len(shop.did) >= 10, kill=True)
        for life in range(30):
            if len(shop.did) > 2 * orders:
                break  # the rest is for the last one
            turns = moments.expovariate(8 / whole)
            await _live(place, shop, f"w{life}", turns.__le__, kill=moments.random() < 0.5)
        assert 0 < len(shop.did) < 4 * orders, "they ended in the middle of the work"
        async with place.worker(shop.service(), "last", lease_s=1.0):
            await place.quiet(completed=orders)
        assert await _pending_entries(place, shop) == 0
        for n in range(orders):
            history = await place.store.history("Order", f"o{n}")
            assert [row.version for row in history] == list(range(1, len(history) + 1))
    assert len(set(shop.did)) == 4 * orders, "each order was charged, shipped, noted and counted"


async def _pending_entries(place: Site, shop: Shop) -> int:
    """How many entries the group was handed and has not acknowledged."""
    client = redis.asyncio.Redis.from_url(place.bus_url)
    try:
        pending = 0
        for topic in shop.service().topics:
            groups = await client.xinfo_groups(f"sagacity:{topic}")
            pending += sum(group["pending"] for group in groups)
        return pending
    finally:
        await client.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True], ids=["before it joined", "at work"])
@pytest.mark.parametrize("away", ["store", "bus"])
async def test_an_end_while_a_server_does_not_answer(
    postgres_url: str, redis_url: str, away: str, joined: bool
) -> None:
    """One server is frozen as a network is that drops packets: the worker ends all the same."""
    shop = Shop()
    url = make_url(postgres_url)
    async with (
        site(postgres_url, redis_url) as place,
        TcpProxy(url.port or 5432) as sql,
        TcpProxy(redis_url.removeprefix("unix://")) as bus,
    ):
        frozen = sql if away == "store" else bus
        store_url = url.set(host="127.0.0.1", port=sql.port).render_as_string(hide_password=False)
        store = SqlStore(store_url, deadline_s=3.0)
        redis_bus = RedisBus(f"redis://127.0.0.1:{bus.port}/0", timeout_s=2.0)
        settings = Settings(store=postgres_url, bus=redis_url, **QUICK)
        worker = Worker(shop.service(), store, redis_bus, settings, consumer="w")
        if not joined:
            frozen.freeze()
        began = 0.0
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run)
                if joined:
                    await place.publish(OrderPlaced("o1"))
                    await place.until(lambda: shop.times("ship", "o1") == 1, "some work")
                    frozen.freeze()
                    await place.publish(*(OrderPlaced(f"o{n}") for n in range(2, 20)))
                else:
                    await place.until(lambda: frozen.accepted > 0, "it tries to connect")
                began = time.monotonic()
                worker.kill()
        took_s = time.monotonic() - began
        frozen.thaw()
        await redis_bus.close()
        await store.close()
        assert took_s < 15
