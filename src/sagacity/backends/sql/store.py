"""The store on SQL: one object for the worker, the relay, the participants and the operators."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any

from sqlalchemy import URL, Table, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from sagacity.backends.sql import inspector, marks, migrations, outbox, retention, tasks
from sagacity.backends.sql.database import Database, OpenTransaction, configure, open_engine
from sagacity.backends.sql.dialects import Dialect, Given, Query
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.rows import due_timeout_of, parked_of
from sagacity.backends.sql.tables import IS_OF_SAGA, parked, timeout
from sagacity.backends.sql.transaction import SqlTransaction
from sagacity.backends.sql.work import SessionFactory, SqlWork, recording_session
from sagacity.core.instance import Instance
from sagacity.core.plan import OutboxRow, TransitionRow
from sagacity.ports import (
    Clock,
    DeadLetter,
    Due,
    Finish,
    Lost,
    Mark,
    PendingRow,
    Retention,
    SagaRow,
    Task,
    Witness,
)


class SqlStore:
    """All ports of a store on SQLite or PostgreSQL.

    `Store`, `OutboxStore`, `TaskStore`, `RetentionStore`, `Inspector` and `MarkStore`.

    URLs: ``sqlite+aiosqlite:///file.db``, ``postgresql+asyncpg://...``, ``postgresql+psycopg://...``.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        clock: Clock | None = None,
        session_factory: SessionFactory = recording_session,
        deadline_s: float = 40.0,
    ) -> None:
        """Nothing is opened yet.

        Args:
            url_or_engine: Where the database is. An engine of yours is used as it is, its connections
                get this store's settings, and `close` leaves it open.
            clock: The time of the store; by default the database's.
            session_factory: Makes the session of a participant's task out of the engine; by default one
                that publishes what entities record.
            deadline_s: Seconds after which an unanswered statement counts as `Unavailable`; more than
                the server's own timeouts, which are 30 s.

        Raises:
            ConfigurationError: The URL, its database or its driver cannot be used.
        """
        if isinstance(url_or_engine, AsyncEngine):
            engine, owned = url_or_engine, False
            configure(engine)
        else:
            engine, owned = open_engine(url_or_engine), True
        self._database = Database(engine, clock, deadline_s=deadline_s, owned=owned)
        self._session_factory = session_factory

    @property
    def clock(self) -> Clock:
        """The store's time."""
        return self._database.clock

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for sessions of the application that write to the same database."""
        return self._database.engine

    async def prepare(self, *, create: bool = False) -> None:
        """Reaches the database and checks the version of its tables; see `Store.prepare`."""
        if create:
            await self._database.write("prepare", migrations.upgrade)
        else:
            await self._database.read("prepare", migrations.check)

    async def close(self) -> None:
        """Ends all connections of an engine that is ours. Safe to call twice."""
        await self._database.close()

    # ------------------------------------------------------------------------------------- batches

    def transaction(self, *, optimistic: bool = False) -> TransactionContext:
        """The transaction of a batch; see `Store.transaction`."""
        return TransactionContext(
            OpenTransaction(self._database, "batch", keeps_plans=True, optimistic=optimistic)
        )

    async def due(self, saga_types: Collection[str], limit: int) -> Due:
        """Timeouts and parked messages that are due; at most `limit` of each, oldest first."""
        now = self.clock.now()
        return await self._database.query("due", lambda c: _due(c, saga_types, now, limit))

    # -------------------------------------------------------------------------------------- outbox

    async def pending(self, older_than: int, limit: int, after: int = 0) -> list[PendingRow]:
        """Whole prefixes of lanes that wait for too long; see `OutboxStore.pending`."""
        return await self._database.query(
            "pending", lambda c: outbox.overdue(c, older_than, limit, after)
        )

    async def published(self, seqs: Sequence[int]) -> None:
        """Forgets pending rows; see `OutboxStore.published`."""
        if seqs:
            async with OpenTransaction(self._database, "published") as opened:
                await opened.run("published", lambda on: outbox.forget(on, seqs))

    async def append(self, rows: Sequence[OutboxRow]) -> list[PendingRow]:
        """Writes outbox rows in a transaction of their own; see `OutboxStore.append`."""
        async with OpenTransaction(self._database, "append") as opened:
            return await opened.run("append", lambda c: _append(c, rows, opened.now))

    # --------------------------------------------------------------------------------------- tasks

    async def claim(self, consumers: Mapping[str, int], lease_us: int, gap_us: int) -> list[Task]:
        """Hands out due tasks; see `TaskStore.claim`."""
        now = self.clock.now()
        chosen = await self._database.query(
            "claim", lambda c: tasks.candidates(c, consumers, now, gap_us)
        )
        if not chosen:
            return []
        async with OpenTransaction(self._database, "claim") as opened:
            return await opened.run(
                "claim", lambda c: tasks.claim(c, chosen, opened.now, lease_us, gap_us)
            )

    async def renew(self, renewed: Sequence[Task], lease_us: int) -> list[Task]:
        """Extends leases; see `TaskStore.renew`."""
        if not renewed:
            return []
        async with OpenTransaction(self._database, "renew") as opened:
            return await opened.run(
                "renew", lambda c: tasks.renew(c, renewed, opened.now, lease_us)
            )

    def work(self, task: Task) -> SqlWork:
        """The transaction of one task; see `TaskStore.work`."""
        return SqlWork(self._database, task, self._session_factory)

    async def finish(self, finishes: Sequence[Finish]) -> list[PendingRow]:
        """Ends tasks that used no session; see `TaskStore.finish`."""
        if not finishes:
            return []
        async with OpenTransaction(self._database, "finish") as opened:
            return await opened.run("finish", lambda c: _finish(c, finishes, opened.now))

    async def next_task_at(self, consumers: Collection[str]) -> int | None:
        """When the next parked task will be due; see `TaskStore.next_task_at`."""
        now = self.clock.now()
        return await self._database.query("next task", lambda c: tasks.next_due(c, consumers, now))

    # ----------------------------------------------------------------------------------- operators

    async def clean(self, keep: Retention, limit: int) -> int:
        """Deletes what is old; see `RetentionStore.clean`."""
        async with OpenTransaction(self._database, "clean", core=True) as opened:
            return await opened.run_core(
                "clean", lambda c: retention.clean(c, keep, opened.now, limit)
            )

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
        return await self._database.read(
            "list of sagas",
            lambda c: inspector.list_sagas(
                c, saga_type=saga_type, status=status, state=state, limit=limit, after=after
            ),
        )

    async def saga(self, saga_type: str, saga_key: str) -> Instance | None:
        """One instance."""
        return await self._database.read(
            "saga", lambda c: inspector.one_saga(c, saga_type, saga_key)
        )

    async def history(self, saga_type: str, saga_key: str) -> list[TransitionRow]:
        """The transitions of one instance; see `Inspector.history`."""
        return await self._database.read(
            "history", lambda c: inspector.history(c, saga_type, saga_key)
        )

    async def dead_letters(self, *, consumer: str = "", limit: int = 50) -> list[DeadLetter]:
        """Dead letters that were not replayed; see `Inspector.dead_letters`."""
        return await self._database.read(
            "dead letters",
            lambda c: inspector.list_dead_letters(c, consumer=consumer, limit=limit),
        )

    async def replay(self, ids: Sequence[int]) -> int:
        """Parks dead letters again; see `Inspector.replay`."""
        async with OpenTransaction(self._database, "replay", core=True) as opened:
            return await opened.run_core("replay", lambda c: inspector.replay(c, ids, opened.now))

    async def counts(self) -> dict[str, int]:
        """Rows that matter to an operator; see `Inspector.counts`."""
        now = self.clock.now()
        return await self._database.read("counts", lambda c: inspector.counts(c, now))

    # ------------------------------------------------------------------------------- loss of the bus

    async def witness(self) -> Witness:
        """What the store knows of its bus; see `MarkStore.witness`."""
        return await self._database.read("witness", marks.witness)

    async def marks(self, topic: str) -> list[Mark]:
        """The marks of a topic, newest first."""
        return await self._database.read("marks", lambda c: marks.marks_of(c, topic))

    async def record(self, fresh: Sequence[Mark], dropped: Sequence[Mark] = ()) -> None:
        """Adds marks and forgets others; see `MarkStore.record`."""
        await self._database.write("record marks", lambda c: marks.record(c, fresh, dropped))

    async def republish(
        self, lost: Sequence[Lost], *, seen: Witness, epoch: str, identity: str
    ) -> int:
        """Makes outbox rows pending again; see `MarkStore.republish`."""
        return await self._database.write(
            "republish",
            lambda c: marks.republish(c, lost, seen=seen, epoch=epoch, identity=identity),
        )


class TransactionContext:
    """Begins on entering; commits on leaving, or rolls back."""

    def __init__(self, opened: OpenTransaction) -> None:
        self._opened = opened

    async def __aenter__(self) -> SqlTransaction:
        """Begins."""
        return SqlTransaction(await self._opened.__aenter__())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends; see `OpenTransaction`."""
        await self._opened.__aexit__(kind, error, trace)


def _append(on: Executor, rows: Sequence[OutboxRow], now: int) -> list[PendingRow]:
    return outbox.prefix(on, outbox.append_rows(on, rows, now))


def _finish(on: Executor, finishes: Sequence[Finish], now: int) -> list[PendingRow]:
    _, written = tasks.end(on, finishes, now)
    return outbox.prefix(on, written)


# --------------------------------------------------------------------------------------------- due


def _due(on: Executor, saga_types: Collection[str], now: int, limit: int) -> Due:
    due = Due(timeouts=[], parked=[], next_at=None)
    if not saga_types:
        return due
    asked = [(saga_type,) for saga_type in sorted(saga_types)]
    timeouts, next_timeout = _due_of(on, timeout, asked, now, limit)
    parked_rows, next_parked = _due_of(on, parked, asked, now, limit)
    due.timeouts = [due_timeout_of(row) for row in timeouts]
    due.parked = [parked_of(row) for row in parked_rows]
    due.next_at = min((at for at in (next_timeout, next_parked) if at is not None), default=None)
    return due


def _due_of(
    on: Executor, table: Table, asked: list[tuple[str]], now: int, limit: int
) -> tuple[Sequence[Any], int | None]:
    """The rows that are due, and when the next one will be."""
    dialect = on.dialect
    statement, given = _due_rows(dialect, table)
    arguments = {**given.arguments(asked), "now": now}
    rows = on.read(statement, {**arguments, "most": limit})
    if len(rows) == limit:
        return rows, now  # there may be more that are due already
    statement, _ = _next_due(dialect, table)
    return rows, on.read(statement, arguments)[0][0]


@cache
def _due_rows(dialect: Dialect, table: Table) -> tuple[Query, Given]:
    given = dialect.given(table.c.saga_type)
    statement = (
        select(*table.c)
        .where(table.c.due_at <= bindparam("now"), given.holds(table.c.saga_type))
        .order_by(table.c.due_at)
        .limit(bindparam("most"))
    )
    return (statement.where(IS_OF_SAGA) if table is parked else statement), given


@cache
def _next_due(dialect: Dialect, table: Table) -> tuple[Query, Given]:
    given = dialect.given(table.c.saga_type)
    statement = select(func.min(table.c.due_at)).where(
        table.c.due_at > bindparam("now"), given.holds(table.c.saga_type)
    )
    return (statement.where(IS_OF_SAGA) if table is parked else statement), given
