"""The memory store keeps the promises of a store, and can be looked at and set back."""

from __future__ import annotations

import subprocess
import sys

import anyio
import anyio.lowlevel
import msgspec
import pytest

from sagacity.backends.memory import MemoryStore
from sagacity.backends.memory.tables import Rows
from sagacity.core.errors import ConfigurationError, Conflict, KeyTaken, StoreError
from sagacity.core.instance import Status
from sagacity.core.plan import Plan
from sagacity.ports import Clock, Finish, Lookup, Mark, Task
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.store import StoreConformance
from sagacity.testing.conformance.stores import (
    LARGEST,
    SECOND,
    correlation,
    dead_letter,
    envelope,
    inbox,
    instance,
    outbox,
    parked,
    timeout,
    transition,
)


class MemoryDatabase:
    serial = False
    sessions = False

    def __init__(self) -> None:
        self._store: MemoryStore | None = None

    def connect(self, clock: Clock) -> MemoryStore:
        """One object is the whole database: workers of one process share it."""
        if self._store is None:
            self._store = MemoryStore(clock)
        return self._store


@pytest.mark.asyncio
class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def database(self) -> MemoryDatabase:
        return MemoryDatabase()


async def filled(store: MemoryStore) -> None:
    """Writes at least one row of every table."""
    row = parked("c1", consumer="pay", saga_type="", lane="uid:pay", sequence=1, reason="work")
    undo = parked(
        "u1", consumer="pay", saga_type="", reason="work", envelope=envelope("u1", undoes="c9")
    )
    async with store.transaction() as transaction:
        plan = Plan(
            now=transaction.now,
            saga_inserts=[instance("o1"), instance("o2", status=Status.COMPLETED)],
            inbox=[inbox("m1"), inbox("m2")],
            correlations_past=[("Order", "user", "cid")],
            correlations=[correlation("ann"), correlation("bob", unique=True)],
            outbox=[outbox("e1", "lane"), outbox("e2"), outbox("e3", "lane")],
            timeouts=[timeout()],
            parked=[parked("m3"), row, undo],
            dead_letters=[dead_letter("m4")],
            transitions=[transition(1), transition(2)],
        )
        await transaction.write(plan)
    await store.published([2])
    tasks = await store.claim({"pay": 10}, SECOND, SECOND)
    done = [task for task in tasks if task.row.message_id == "u1"]
    await store.finish([Finish(task=task) for task in done])
    await store.republish([], seen=await store.witness(), epoch="e1", identity="i1")
    await store.record([Mark(topic="orders", at=1, entry_id="1-1", max_seq=1)])


@pytest.mark.asyncio
async def test_snapshot_holds_everything_and_restores_it() -> None:
    store = MemoryStore(VirtualClock())
    await filled(store)
    snapshot, digest = store.snapshot(), store.state_hash()
    rows = msgspec.msgpack.decode(snapshot)
    assert all(rows[:5]), rows[:5]  # counters, epoch, identity
    names = Rows.__struct_fields__[5:]
    assert all(rows[5:]), [name for name, row in zip(names, rows[5:], strict=True) if not row]
    other = MemoryStore(VirtualClock())
    other.restore(snapshot)
    assert other.snapshot() == snapshot
    # What follows from the rows was made again too.
    assert await other.counts() == await store.counts()
    assert await other.pending(LARGEST, 9) == await store.pending(LARGEST, 9)
    for each in (store, other):
        async with each.transaction() as transaction:
            lookup = Lookup("Order", "user", "ann")
            assert await transaction.correlated([lookup]) == {lookup: ("o1",)}
        taken = Plan(now=0, correlations=[correlation("bob", "o3", unique=True)])
        with pytest.raises(KeyTaken):
            async with each.transaction() as transaction:
                await transaction.write(taken)
        assert await each.append([outbox("e1", "lane")]) == []
        assert await each.next_task_at(["pay"]) is None
        assert [t.row.message_id for t in await each.claim({"pay": 9}, 1, 1)] == []
    await other.append([outbox("e9")])
    assert other.state_hash() != digest
    other.restore(snapshot)
    assert other.state_hash() == digest


@pytest.mark.asyncio
async def test_failed_or_idle_calls_leave_no_trace() -> None:
    store = MemoryStore(VirtualClock())
    await filled(store)
    digest = store.state_hash()
    with pytest.raises(RuntimeError):
        async with store.transaction() as transaction:
            await transaction.load({"Order": ["o1", "o2"]})
            await transaction.write(Plan(now=transaction.now, outbox=[outbox("new", "lane")]))
            raise RuntimeError
    with pytest.raises(Conflict):
        async with store.transaction() as transaction:
            await transaction.write(
                Plan(now=transaction.now, outbox=[outbox("new")], inbox=[inbox("m1")])
            )
    assert await store.claim({"pay": 10}, SECOND, SECOND) == []
    assert await store.renew([], SECOND) == []
    await store.published([2, 77])
    assert (await store.due(["Order"], 10)).parked
    assert store.state_hash() == digest
    async with store.transaction() as transaction:
        assert not (await transaction.load({"Order": ["o1", "o2"]})).busy


@pytest.mark.asyncio
async def test_nothing_is_seen_before_the_commit() -> None:
    store = MemoryStore()
    async with store.transaction() as writing:
        rows = await writing.write(
            Plan(
                now=writing.now,
                saga_inserts=[instance("o1")],
                inbox=[inbox("m1")],
                outbox=[outbox("e1", "lane")],
            )
        )
        assert [row.envelope.id for row in rows] == ["e1"]
        async with store.transaction() as reading:
            loaded = await reading.load({"Order": ["o1"]})
            assert (loaded.instances, loaded.busy) == ({}, set())
            assert not (await reading.known([("Order", "m1")])).seen
        assert await store.pending(LARGEST, 10) == []
    assert [row.envelope.id for row in await store.pending(LARGEST, 10)] == ["e1"]


@pytest.mark.asyncio
async def test_writers_take_turns() -> None:
    store = MemoryStore()
    refused: list[str] = []

    async def start(worker: str) -> None:
        try:
            async with store.transaction() as transaction:
                await transaction.write(
                    Plan(
                        now=transaction.now,
                        saga_inserts=[instance("o1", state=worker)],
                        inbox=[inbox("m1", worker)],
                        outbox=[outbox(worker, "lane")],
                    )
                )
                await anyio.lowlevel.checkpoint()
        except Conflict:
            refused.append(worker)

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(start, f"w{number}")
    winner = store.tables.sagas["Order", "o1"].state
    assert {*refused, winner} == {f"w{number}" for number in range(5)}
    assert [row.envelope.id for row in await store.pending(LARGEST, 10)] == [winner]
    assert list(store.tables.inbox) == [(winner, "m1")]


@pytest.mark.asyncio
async def test_restore_under_an_open_transaction_is_refused() -> None:
    store = MemoryStore()
    await filled(store)
    snapshot = store.snapshot()
    async with store.transaction() as transaction:
        await transaction.load({"Order": ["o1"]})
        with pytest.raises(StoreError, match="open transaction"):
            store.restore(snapshot)


@pytest.mark.asyncio
async def test_session_of_a_task_says_what_to_do() -> None:
    store = MemoryStore()
    await filled(store)
    task = Task(row=parked("c1"), token="", lease_until=0, tombstone=False)
    async with store.work(task) as work:
        with pytest.raises(ConfigurationError, match="expected a SQL store"):
            _ = work.session


def test_memory_backend_runs_without_sqlalchemy_and_redis() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['sqlalchemy', 'redis', 'aiosqlite']));"
        "import sagacity.backends.memory, sagacity.testing.clock;"
        "sagacity.backends.memory.MemoryStore(); sagacity.backends.memory.MemoryBus()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
