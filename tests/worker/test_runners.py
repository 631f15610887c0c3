"""Who runs batches, and two workers that get every message at the same time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from sqlalchemy import text

from sagacity import Event, Saga, Service, State, on
from sagacity.backends.memory import MemoryBus, MemoryStore, MemoryTransaction
from sagacity.backends.sql import SqlStore
from sagacity.core.delivery import Delivery
from sagacity.worker.config import Settings
from sagacity.worker.cycle import Cycle
from sagacity.worker.sorting import Sorted
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually
from tests.worker.running import QUICK, envelope

pytestmark = pytest.mark.asyncio


class Counted(Event, topic="runners"):
    ref: str


class Told(Event, topic="told"):
    number: int


class Counting(Saga, key="ref"):
    counting = State()
    done = State(final=True)

    ref: str
    times: int = 0

    @on(Counted, starts=True, goto=counting)
    def begin(self, event: Counted) -> None:
        self.count(event)

    @on(Counted, when=counting, goto=(counting, done))
    def count(self, event: Counted) -> None:
        self.times += 1
        self.publish(Told(self.times))
        if self.times == 10**6:
            self.goto(self.done)


SEED = 7
service = Service("runners", sagas=[Counting])
catalog = service.catalog()


class Broken(Exception):
    """Raised by a store of a test: nothing that a worker knows."""


class Held(MemoryStore):
    """A store whose batches stay in their transactions until they may go."""

    def __init__(self) -> None:
        super().__init__()
        self.open = anyio.Event()
        self.inside: list[MemoryTransaction] = []
        self.most = 0
        self.broken = False

    @asynccontextmanager
    async def transaction(self, *, optimistic: bool = False) -> AsyncGenerator[MemoryTransaction]:
        async with super().transaction(optimistic=optimistic) as transaction:
            self.inside.append(transaction)
            self.most = max(self.most, len(self.inside))
            try:
                await self.open.wait()
                if self.broken:
                    raise Broken
                yield transaction
            finally:
                self.inside.remove(transaction)


def worker_on(store: MemoryStore, bus: MemoryBus, **settings: Any) -> Worker:
    changed: dict[str, Any] = {**QUICK, **settings}
    return Worker(service, store, bus, Settings(store="memory:", bus="memory:", **changed))


async def reached(store: Held, many: int) -> None:
    async def holds() -> bool:
        return len(store.inside) == many

    await async_eventually(holds, f"{many} batches are under way")


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_batches_than_allowed_and_none_forgotten(most: int) -> None:
    store, bus = Held(), MemoryBus()
    await bus.publish([envelope(Counted(f"o{n}"), f"m{n}") for n in range(20)])
    worker = worker_on(store, bus, batch_max=1, batches_max=most)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await reached(store, most)
        worker.stop()  # what is under way and what was read is finished
        store.open.set()
    assert store.most == most
    handled = {message_id for _, message_id in store.tables.inbox}
    pending = bus._topics.state.topics["runners"].groups["runners"].pending
    assert not pending
    assert {f"m{n}" for n in range(most)} <= handled


async def test_a_kill_lets_what_is_under_way_commit_and_loses_nothing() -> None:
    store, bus = Held(), MemoryBus()
    await bus.publish([envelope(Counted(f"o{n}"), f"m{n}") for n in range(6)])
    worker = worker_on(store, bus, batch_max=1)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await reached(store, 2)
            worker.kill()
            store.open.set()
    assert len(store.tables.inbox) in range(2, 6)
    again = worker_on(store, bus)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.run)

        async def handled() -> bool:
            return len(store.tables.inbox) == 6

        await async_eventually(handled, "another one handles the rest")
        again.stop()
    assert Counter(row.saga_key for row in store.tables.transitions) == {
        f"o{n}": 1 for n in range(6)
    }


async def test_an_error_nobody_expects_ends_the_worker_and_is_told() -> None:
    store, bus = Held(), MemoryBus()
    await bus.publish([envelope(Counted(f"o{n}"), f"m{n}") for n in range(6)])
    worker = worker_on(store, bus, batch_max=1)
    store.broken = True
    with anyio.fail_after(20), pytest.raises(BaseExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await reached(store, 2)
            store.open.set()
    assert caught.group_contains(Broken)
    assert not store.tables.inbox


# --- two at the same time ----------------------------------------------------------------------------


async def test_every_message_counts_once_however_many_get_it(store_url: str) -> None:
    """Whatever two workers read at the same time: one effect each, in one order."""
    keys, many = 4, 60
    chance = random.Random(SEED)
    messages = [envelope(Counted(f"o{n % keys}"), f"m{n}", time=n) for n in range(many)]
    stores = [SqlStore(store_url) for _ in range(3)]
    conflicts: list[str] = []

    class Watching:
        def notice(self, name: str, attributes: Mapping[str, object]) -> None:
            if name == "batch.conflict":
                conflicts.append(str(attributes["error"]))

    async def work(store: SqlStore, own: Sequence[Delivery]) -> None:
        cycle = Cycle(service, catalog, store, MemoryBus(), observer=Watching())
        left: list[Delivery | Sorted] = list(own)
        while left:
            size = chance.choice([1, 1, 2, 5])
            settled = await cycle.settle(left[:size])
            left = [*left[size:], *settled.busy]
            await cycle.publish(settled.pending)

    try:
        await stores[0].prepare(create=True)
        async with anyio.create_task_group() as tasks:
            for store in stores:
                own = [Delivery(topic="runners", entry_id=one.id, envelope=one) for one in messages]
                chance.shuffle(own)
                tasks.start_soon(work, store, own)
        for number in range(keys):
            found = await stores[0].saga("Counting", f"o{number}")
            assert found is not None
            assert found.version == many // keys
            history = await stores[0].history("Counting", f"o{number}")
            assert [row.version for row in history] == list(range(1, many // keys + 1))
            assert len({row.message_id for row in history}) == many // keys
        async with stores[0].engine.connect() as connection:
            sent = await connection.execute(
                text("SELECT lane, body FROM sagacity_outbox ORDER BY seq")
            )
            told: dict[bytes, list[int]] = {}
            for lane, body in sent:
                told.setdefault(lane, []).append(msgspec.json.decode(body)["number"])
        assert list(told.values()) == [list(range(1, many // keys + 1))] * keys, "in order, once"
        assert conflicts, "they never met"
    finally:
        for store in stores:
            await store.close()
