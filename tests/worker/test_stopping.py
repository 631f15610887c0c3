"""A worker that is stopped at any moment: it returns in time, and what it held is found by others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import anyio
import pytest

from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.ports import Due
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.worker.running import QUICK, envelope
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
