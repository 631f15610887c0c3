"""The store in memory: the promises of a database, for one process and as long as it lives.

A transaction collects what it will write and writes it all at once when it commits, so nothing half
done is ever seen, and a failed or cancelled one leaves nothing behind.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import blake2b
from typing import Any

import anyio
import anyio.lowlevel
import msgspec

from sagacity.backends.memory import inspection, marks, tasks
from sagacity.backends.memory.clock import SystemClock
from sagacity.backends.memory.tables import Key, Rows, Tables
from sagacity.backends.memory.writing import (
    check_armed,
    check_plan,
    check_unchanged,
    is_armed,
    write_plan,
)
from sagacity.core.errors import ConfigurationError, Conflict, StoreError
from sagacity.core.instance import Instance
from sagacity.core.plan import (
    Known,
    Loaded,
    OutboxRow,
    Plan,
    TransitionRow,
)
from sagacity.ports import (
    Clock,
    DeadLetter,
    Due,
    DueTimeout,
    Finish,
    Lookup,
    Lost,
    Mark,
    PendingRow,
    Retention,
    SagaRow,
    Task,
    Witness,
)

_WAIT_S = 3.0
"""How long `load` with `wait` waits for instances that others hold."""

_decoder = msgspec.msgpack.Decoder(Rows)


class Shared:
    """What the transactions of a store share."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tables = Tables()
        self.locks: dict[Key, MemoryTransaction] = {}
        """Instance -> the transaction that holds it."""
        self.released = anyio.Event()
        """Set when a transaction lets go of instances; a new one takes its place."""
        self.writer = anyio.Semaphore(1)
        """Held from the check of a write to its commit, so that what was checked stays true."""


class MemoryStore:
    """All the store ports of `sagacity.ports` in this process.

    Several workers in one event loop may share it, as several processes share a database.

    Args:
        clock: The time of the store; the system's where none is given.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._shared = Shared(clock if clock is not None else SystemClock())

    @property
    def tables(self) -> Tables:
        """The committed rows, to look at."""
        return self._shared.tables

    @property
    def clock(self) -> Clock:
        """The store's time."""
        return self._shared.clock

    async def prepare(self, *, create: bool = False) -> None:  # noqa: ARG002
        """There is no schema that could be missing."""
        await anyio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Nothing to end; the rows stay."""

    # --- batches --------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self, *, optimistic: bool = False) -> AsyncGenerator[MemoryTransaction]:
        """The transaction of a batch; see `Store.transaction`."""
        transaction = MemoryTransaction(self._shared, optimistic=optimistic)
        try:
            yield transaction
            transaction.commit()
        finally:
            transaction.end()

    async def due(self, saga_types: Collection[str], limit: int) -> Due:
        """Timeouts and parked messages that are due; at most `limit` of each, oldest first."""
        await anyio.lowlevel.checkpoint()
        now, types = self._shared.clock.now(), set(saga_types)
        timeouts = [row for row in self.tables.timeouts.values() if row.saga_type in types]
        parked = [
            (parked.row.due_at, parked.row)
            for parked in self.tables.parked.values()
            if parked.row.saga_type in types
            and parked.row.reason != tasks.WORK
            and parked.row.due_at is not None
        ]
        due_timeouts = heapq.nsmallest(
            limit, (row for row in timeouts if row.due_at <= now), key=lambda row: row.due_at
        )
        due_parked = heapq.nsmallest(
            limit, (pair for pair in parked if pair[0] <= now), key=lambda pair: pair[0]
        )
        times = [row.due_at for row in timeouts if row.due_at > now]
        times += [at for at, _ in parked if at > now]
        if limit in (len(due_timeouts), len(due_parked)):
            times.append(now)  # there may be more that are due already
        return Due(
            timeouts=[
                DueTimeout(
                    uid=row.uid,
                    name=row.name,
                    generation=row.generation,
                    due_at=row.due_at,
                    saga_type=row.saga_type,
                    saga_key=row.saga_key,
                )
                for row in due_timeouts
            ],
            parked=[row for _, row in due_parked],
            next_at=min(times, default=None),
        )

    # --- outbox ---------------------------------------------------------------------------------

    async def pending(self, older_than: int, limit: int, after: int = 0) -> list[PendingRow]:
        """Whole prefixes of lanes that wait for too long; see `OutboxStore.pending`."""
        await anyio.lowlevel.checkpoint()
        tables = self.tables
        old = [
            seq
            for seq in tables.pending
            if seq > after and tables.outbox[seq].created_at <= older_than
        ]
        lanes = {tables.outbox[seq].lane for seq in old} - {""}
        chosen = {seq for seq in old if not tables.outbox[seq].lane}
        chosen.update(seq for lane in lanes for seq in tables.pending_of[lane])
        chosen = {seq for seq in chosen if seq > after}
        return [tables.pending_row(seq) for seq in heapq.nsmallest(limit, chosen)]

    async def published(self, seqs: Sequence[int]) -> None:
        """Forgets pending rows; one that is gone already is no error."""
        async with self._shared.writer:
            self.tables.forget(seqs)

    async def append(self, rows: Sequence[OutboxRow]) -> list[PendingRow]:
        """Writes outbox rows; see `OutboxStore.append`."""
        async with self._shared.writer:
            own = self.tables.fresh(rows, self._shared.clock.now())
            self.tables.send(own)
            return self.tables.prefix(own)

    # --- tasks ----------------------------------------------------------------------------------

    async def claim(self, consumers: Mapping[str, int], lease_us: int, gap_us: int) -> list[Task]:
        """Hands out due tasks; see `TaskStore.claim`."""
        async with self._shared.writer:
            return tasks.claim(self.tables, consumers, self._shared.clock.now(), lease_us, gap_us)

    async def renew(self, renewed: Sequence[Task], lease_us: int) -> list[Task]:
        """Extends leases; see `TaskStore.renew`."""
        async with self._shared.writer:
            return tasks.renew(self.tables, renewed, self._shared.clock.now(), lease_us)

    def work(self, task: Task) -> AbstractAsyncContextManager[MemoryWork]:
        """The transaction of one task; see `TaskStore.work`."""
        return self._work(task)

    @asynccontextmanager
    async def _work(self, task: Task) -> AsyncGenerator[MemoryWork]:
        yield MemoryWork(self._shared, task)

    async def finish(self, finishes: Sequence[Finish]) -> list[PendingRow]:
        """Ends tasks; lost leases are skipped. See `TaskStore.finish`."""
        async with self._shared.writer:
            now = self._shared.clock.now()
            own: list[PendingRow] = []
            for finish in finishes:
                if tasks.holds(self.tables, finish.task):
                    tasks.end(self.tables, finish, now)
                    rows = self.tables.fresh(finish.outbox, now)
                    self.tables.send(rows)
                    own += rows
            return self.tables.prefix(own)

    async def next_task_at(self, consumers: Collection[str]) -> int | None:
        """When the next parked task will be due; see `TaskStore.next_task_at`."""
        await anyio.lowlevel.checkpoint()
        return tasks.next_due(self.tables, consumers, self._shared.clock.now())

    # --- loss of the bus --------------------------------------------------------------------------

    async def witness(self) -> Witness:
        """What the store knows of its bus; see `MarkStore.witness`."""
        await anyio.lowlevel.checkpoint()
        return marks.witness(self.tables)

    async def marks(self, topic: str) -> list[Mark]:
        """The marks of a topic, newest first."""
        await anyio.lowlevel.checkpoint()
        return marks.marks_of(self.tables, topic)

    async def record(self, fresh: Sequence[Mark], dropped: Sequence[Mark] = ()) -> None:
        """Adds marks and forgets others; see `MarkStore.record`."""
        async with self._shared.writer:
            marks.record(self.tables, fresh, dropped)

    async def republish(
        self, lost: Sequence[Lost], *, seen: Witness, epoch: str, identity: str
    ) -> int:
        """Makes rows pending again; see `MarkStore.republish`."""
        async with self._shared.writer:
            return marks.republish(self.tables, lost, seen=seen, epoch=epoch, identity=identity)

    # --- operators ------------------------------------------------------------------------------

    async def clean(self, retention: Retention, limit: int) -> int:
        """Deletes what is old; see `RetentionStore.clean`."""
        async with self._shared.writer:
            return inspection.clean(self.tables, retention, self._shared.clock.now(), limit)

    async def sagas(
        self,
        *,
        saga_type: str = "",
        status: str = "",
        state: str = "",
        limit: int = 50,
        after: str = "",
    ) -> list[SagaRow]:
        """Instances; see `Inspector.sagas`."""
        await anyio.lowlevel.checkpoint()
        return inspection.list_sagas(
            self.tables, saga_type=saga_type, status=status, state=state, limit=limit, after=after
        )

    async def saga(self, saga_type: str, saga_key: str) -> Instance | None:
        """One instance."""
        await anyio.lowlevel.checkpoint()
        return self.tables.sagas.get((saga_type, saga_key))

    async def history(self, saga_type: str, saga_key: str) -> list[TransitionRow]:
        """The transitions of one instance; see `Inspector.history`."""
        await anyio.lowlevel.checkpoint()
        return inspection.history(self.tables, saga_type, saga_key)

    async def dead_letters(self, *, consumer: str = "", limit: int = 50) -> list[DeadLetter]:
        """Dead letters that were not replayed; see `Inspector.dead_letters`."""
        await anyio.lowlevel.checkpoint()
        return inspection.list_dead_letters(self.tables, consumer, limit)

    async def replay(self, ids: Sequence[int]) -> int:
        """Parks dead letters again; see `Inspector.replay`."""
        async with self._shared.writer:
            return inspection.replay(self.tables, ids, self._shared.clock.now())

    async def counts(self) -> dict[str, int]:
        """Rows that matter to an operator; see `Inspector.counts`."""
        await anyio.lowlevel.checkpoint()
        return inspection.counts(self.tables, self._shared.clock.now())

    # --- for tests and the checker ----------------------------------------------------------------

    def snapshot(self) -> bytes:
        """All committed rows; equal bytes mean an equal store."""
        return msgspec.msgpack.encode(self.tables.rows())

    def restore(self, snapshot: bytes) -> None:
        """Makes the store hold what it held at `snapshot`; no transaction may be open."""
        if self._shared.locks:
            raise StoreError("restore: expected no open transaction, got one that holds instances")
        self._shared.tables = Tables.of(_decoder.decode(snapshot))

    def state_hash(self) -> str:
        """32 hexadecimal digits that differ where the content differs."""
        return blake2b(self.snapshot(), digest_size=16).hexdigest()


class MemoryTransaction:
    """`sagacity.ports.Transaction`: sees what is committed, writes when it commits."""

    def __init__(self, shared: Shared, *, optimistic: bool = False) -> None:
        """`optimistic`: loads without locks, and compares when it writes."""
        self._shared = shared
        self._optimistic = optimistic
        self._read: dict[Key, int] = {}
        """Versions of the instances that were loaded without a lock."""
        self._armed: set[tuple[str, str, int]] = set()
        """Timeouts (uid, name, generation) that were read by an optimistic one."""
        self._now = shared.clock.now()
        self._plan: Plan | None = None
        self._own: list[PendingRow] = []
        self._published: tuple[int, ...] = ()
        self._locked: set[Key] = set()
        self._committed = False
        self._failure: Exception | None = None

    @property
    def now(self) -> int:
        """The store's time at the begin of the transaction."""
        return self._now

    async def correlated(self, lookups: Collection[Lookup]) -> Mapping[Lookup, tuple[str, ...]]:
        """Keys of the instances that have each value; see `Transaction`."""
        await anyio.lowlevel.checkpoint()
        tables = self._shared.tables
        found: dict[Lookup, tuple[str, ...]] = {}
        for lookup in lookups:
            place = (lookup.saga_type, lookup.name, lookup.value)
            if place in tables.correlations:
                found[lookup] = tuple(sorted(tables.correlations[place]))
            elif place in tables.past_keys:
                found[lookup] = ()
        return found

    async def load(self, wanted: Mapping[str, Collection[str]], *, wait: bool = False) -> Loaded:
        """Locks and loads the instances that are free; see `Transaction`."""
        await anyio.lowlevel.checkpoint()
        keys = sorted({(kind, key) for kind, some in wanted.items() for key in some})
        if wait:
            with anyio.move_on_after(_WAIT_S):
                while any(self._held(key) for key in keys):
                    await self._shared.released.wait()
        loaded = Loaded(instances={}, busy=set())
        for key in keys:
            instance = self._shared.tables.sagas.get(key)
            if instance is None:
                continue
            if self._optimistic and not wait:
                self._read[key] = instance.version
                loaded.instances[key] = instance
                continue
            if self._held(key):
                loaded.busy.add(key)
                continue
            self._shared.locks[key] = self
            self._locked.add(key)
            loaded.instances[key] = instance
        return loaded

    def _held(self, key: Key) -> bool:
        """True where another transaction holds the instance."""
        return self._shared.locks.get(key, self) is not self

    async def known(
        self,
        inbox: Collection[Key],
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Collection[Key] = (),
    ) -> Known:
        """What guards against a second effect; see `Transaction`."""
        await anyio.lowlevel.checkpoint()
        tables = self._shared.tables
        armed = {row for row in timeouts if is_armed(tables, row)}
        if self._optimistic:
            self._armed |= armed
        return Known(
            seen={key for key in inbox if key in tables.inbox},
            timeouts=armed,
            parked={key for key in parked if key in tables.parked},
        )

    async def read(
        self,
        wanted: Mapping[str, Collection[str]],
        inbox: Collection[Key],
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Collection[Key] = (),
        *,
        wait: bool = False,
    ) -> tuple[Loaded, Known]:
        """Both at once; see `Transaction`."""
        loaded = await self.load(wanted, wait=wait)
        return loaded, await self.known(inbox, timeouts, parked)

    async def write(self, plan: Plan, published: Sequence[int] = ()) -> list[PendingRow]:
        """Checks the plan and keeps it for the commit; see `Transaction.write`."""
        if self._plan is not None:
            raise StoreError("write: expected one plan for each transaction, got another one")
        await self._shared.writer.acquire()
        tables = self._shared.tables
        try:
            changed = {(one.type, one.key) for one, _ in plan.saga_updates}
            others = {key for key in (*changed, *self._read) if self._held(key)}
            check_plan(tables, plan, others)
            check_unchanged(tables, self._read, others)
            check_armed(tables, plan, self._armed)
        except Exception as error:
            self._shared.writer.release()
            self._failure = error
            raise
        self._plan, self._published = plan, tuple(published)
        self._own = tables.fresh(plan.outbox, plan.now)
        return tables.prefix(self._own, self._published)

    def commit(self) -> None:
        """Writes the plan; nothing in that can fail or wait. Raises what an earlier write raised."""
        if self._failure is not None:
            raise self._failure
        if self._plan is not None:
            tables = self._shared.tables
            write_plan(tables, self._plan)
            tables.send(self._own)
            tables.forget(self._published)
            self._committed = True

    def end(self) -> None:
        """Lets go of everything held."""
        shared = self._shared
        if self._plan is not None:
            if not self._committed:
                shared.tables.last_seq -= len(self._own)  # nobody else took numbers meanwhile
            self._plan = None
            shared.writer.release()
        for key in self._locked:
            del shared.locks[key]
        if self._locked:
            self._locked.clear()
            shared.released.set()
            shared.released = anyio.Event()


class MemoryWork:
    """`sagacity.ports.Work` without a session."""

    def __init__(self, shared: Shared, task: Task) -> None:
        self._shared = shared
        self._task = task

    @property
    def session(self) -> Any:
        """There is none. Raises ConfigurationError."""
        raise ConfigurationError(
            f"{self._task.row.consumer} asked for a session, but this store is in memory; expected a "
            "SQL store; run the worker with --store sqlite+aiosqlite:///file.db or postgresql+..."
        )

    async def finish(self, finish: Finish) -> list[PendingRow]:
        """Writes the end of the task; see `Work.finish`."""
        shared = self._shared
        async with shared.writer:
            row = finish.task.row
            if not tasks.holds(shared.tables, finish.task):
                raise Conflict(
                    f"finish: expected the lease {finish.task.token} of message {row.message_id} for "
                    f"{row.consumer}, got none; it ran out and the task is another worker's; nothing "
                    "was written"
                )
            now = shared.clock.now()
            tasks.end(shared.tables, finish, now)
            own = shared.tables.fresh(finish.outbox, now)
            shared.tables.send(own)
            return shared.tables.prefix(own)
