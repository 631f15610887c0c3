"""Real workers in the test's own loop, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import anyio

from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.core.delivery import Envelope, enveloped
from sagacity.core.messages import Message
from sagacity.service import Service
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually

QUICK: dict[str, Any] = {
    "read_block_ms": 100,
    "batch_deadline_ms": 100,
    "reclaim_idle_ms": 300,
    "reclaim_interval_ms": 50,
    "timeouts_poll_ms": 20,
    "sweep_interval_ms": 20,
    "pending_age_ms": 100,
    "backoff_base_ms": 20,
    "backoff_cap_s": 0.2,
    "lease_s": 2.0,
}


def envelope(message: Message, message_id: str = "", *, time: int = 1) -> Envelope:
    """A message as somebody outside would publish it."""
    return enveloped(message, message_id=message_id or uuid4().hex, time=time)


class Site:
    """A store and a bus, and the workers that run on them."""

    def __init__(self, store_url: str, bus_url: str) -> None:
        self.store_url, self.bus_url = store_url, bus_url
        self.store = SqlStore(store_url)
        self.bus = RedisBus(bus_url)

    async def publish(self, *messages: Message, ids: list[str] | None = None) -> None:
        names = ids or [""] * len(messages)
        await self.bus.publish([envelope(m, i) for m, i in zip(messages, names, strict=True)])

    @asynccontextmanager
    async def worker(
        self, service: Service, consumer: str = "", **settings: Any
    ) -> AsyncIterator[Worker]:
        """A worker with connections of its own; drained at the end unless it was killed."""
        store, bus = SqlStore(self.store_url), RedisBus(self.bus_url)
        worker = Worker(
            service,
            store,
            bus,
            Settings(store=self.store_url, bus=self.bus_url, **{**QUICK, **settings}),
            consumer=consumer,
        )
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run)
                await self.until(lambda: worker.ready, "the worker joins")
                try:
                    yield worker
                finally:
                    worker.stop()
        finally:
            await store.close()
            await bus.close()

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        async def holds() -> bool:
            return condition()

        await async_eventually(holds, what, seconds)

    async def quiet(self, seconds: float = 30.0, **statuses: int) -> dict[str, int]:
        """Waits until nothing is pending or parked and the instances are as given; returns counts."""
        counts: dict[str, int] = {}

        async def holds() -> bool:
            counts.clear()
            counts.update(await self.store.counts())
            return (
                counts["outbox.pending"] == 0
                and counts["parked"] == 0
                and all(counts[f"sagas.{name}"] == number for name, number in statuses.items())
            )

        try:
            await async_eventually(holds, "everything is quiet", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {counts}") from None
        return counts


@asynccontextmanager
async def site(store_url: str, bus_url: str) -> AsyncIterator[Site]:
    """An empty store and bus."""
    place = Site(store_url, bus_url)
    try:
        await place.store.prepare(create=True)
        yield place
    finally:
        await place.store.close()
        await place.bus.close()
