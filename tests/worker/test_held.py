"""Messages whose instance another worker holds, for short or long."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest

from sagacity import Event, Saga, Service, State, on, on_timeout
from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually
from tests.worker.running import QUICK, envelope

pytestmark = pytest.mark.asyncio


class Begun(Event, topic="held"):
    ref: str


class Poked(Event, topic="held"):
    ref: str


class Ended(Event, topic="held"):
    ref: str


class Held(Saga, key="ref"):
    waiting = State()
    ended = State(final=True)

    ref: str
    pokes: int = 0
    late: int = 0

    @on(Begun, starts=True, goto=waiting)
    def begin(self, event: Begun) -> None:
        self.set_timeout("patience", after=timedelta(milliseconds=200))

    @on(Ended, when=waiting, goto=ended)
    def end(self, event: Ended) -> None: ...

    @on(Poked, when=waiting)
    def poke(self, event: Poked) -> None:
        self.pokes += 1

    @on_timeout("patience", when=waiting)
    def over(self) -> None:
        self.late += 1


class Sizes:
    """Notes how many inputs the largest batch had."""

    def __init__(self) -> None:
        self.largest = 0

    def notice(self, name: str, attributes: Mapping[str, object]) -> None:
        if name == "batch.committed":
            self.largest = max(self.largest, int(str(attributes["inputs"])))


service = Service("held", sagas=[Held])


@asynccontextmanager
async def working(
    store: MemoryStore, bus: MemoryBus, sizes: Sizes | None = None
) -> AsyncGenerator[Worker]:
    changed: dict[str, Any] = {
        **QUICK,
        "reclaim_idle_ms": 300,
        "reclaim_interval_ms": 20,
        "read_block_ms": 20,
    }
    settings = Settings(store="memory:", bus="memory:", **changed)
    worker = Worker(service, store, bus, settings, consumer="w", observer=sizes)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            yield worker
            worker.stop()


@asynccontextmanager
async def locked(store: MemoryStore, key: str) -> AsyncGenerator[None]:
    """Holds an instance as another worker does in the middle of a batch."""
    async with store.transaction() as transaction:
        loaded = await transaction.load({"Held": {key}})
        assert loaded.instances
        yield


async def seen(store: MemoryStore, key: str) -> tuple[int, int]:
    instance = await store.saga("Held", key)
    if instance is None:
        return -1, -1
    saga = Held.__definition__.decode(instance.data)
    assert isinstance(saga, Held)
    return saga.pokes, saga.late


async def eventually_seen(store: MemoryStore, expected: tuple[int, int]) -> None:
    async def holds() -> bool:
        return await seen(store, "o1") == expected

    await async_eventually(holds, f"pokes and timeouts are {expected}")


def busy(worker: Worker) -> int:
    return int(str(worker.report().get("busy", 0)))


async def test_an_entry_that_was_handed_out_often_waits_for_its_instance_like_any_other() -> None:
    """Held for longer than it takes to be handed out again: it is no message that kills."""
    store, bus = MemoryStore(), MemoryBus()
    await store.prepare(create=True)
    await bus.publish([envelope(Begun("o1"))])
    async with working(store, bus):
        await eventually_seen(store, (0, 1))
    lost = await bus.join("held", "gone1", service.topics)
    await bus.publish([envelope(Poked("o1"), "p1")])
    assert len(await lost.read(10, 1000)) == 1
    again = await bus.join("held", "gone2", service.topics)
    assert len(await again.reclaim(0, 10)) == 1
    async with working(store, bus) as worker:
        async with locked(store, "o1"):

            async def long_enough() -> bool:
                return busy(worker) > 12 or bool(await store.dead_letters())

            await async_eventually(long_enough, "its time to be handed out came several times")
        await eventually_seen(store, (1, 1))
    assert await store.dead_letters() == []


async def test_what_is_due_is_kept_once_however_often_it_is_found() -> None:
    """The timeout of a held instance stays one."""
    store, bus, sizes = MemoryStore(), MemoryBus(), Sizes()
    await store.prepare(create=True)
    await bus.publish([envelope(Begun("o1"))])
    async with working(store, bus, sizes) as worker:
        await eventually_seen(store, (0, 0))
        async with locked(store, "o1"):

            async def long_enough() -> bool:
                return busy(worker) > 12

            await async_eventually(long_enough, "it was found due often")
        await eventually_seen(store, (0, 1))
    assert sizes.largest <= 2
