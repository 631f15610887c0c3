"""The transaction of one task: the user's session and the end of the task commit together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import anyio
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from sagacity.backends.sql import outbox
from sagacity.backends.sql.database import (
    SESSION_IDLE_TIMEOUT_MS,
    TURNS,
    Database,
    OpenTransaction,
)
from sagacity.backends.sql.dialects import POSTGRESQL
from sagacity.backends.sql.errors import lost_to_others, translated
from sagacity.backends.sql.executors import CoreExecutor, Executor
from sagacity.backends.sql.session import SagaSession
from sagacity.backends.sql.tasks import end
from sagacity.core.errors import Conflict, Unavailable
from sagacity.ports import Finish, PendingRow, Task

SessionFactory = Callable[[AsyncEngine], AsyncSession]
"""Makes the session of one task; it must not begin a transaction before its first use."""


def recording_session(engine: AsyncEngine) -> AsyncSession:
    """A session whose entities' recorded events leave with the task's commit."""
    return SagaSession(engine, expire_on_commit=False)


class SqlWork:
    """`sagacity.ports.Work`; leaving its context without `finish` rolls back."""

    def __init__(self, database: Database, task: Task, factory: SessionFactory) -> None:
        self._database = database
        self._task = task
        self._factory = factory
        self._session: AsyncSession | None = None

    @property
    def session(self) -> AsyncSession:
        """The user's session. Its transaction begins with its first statement, not before."""
        if self._session is None:
            engine = self._database.engine
            if self._database.turns is not None:
                # Each transaction on it takes a turn of its own, also one beside the session's.
                engine = engine.execution_options(**{TURNS: self._database.turns})
            self._session = self._factory(engine)
            if self._database.dialect is POSTGRESQL:
                event.listen(self._session.sync_session, "after_begin", _allow_waiting)
        return self._session

    async def finish(self, finish: Finish) -> list[PendingRow]:
        """Ends the task and commits, with whatever the session holds; see `Work.finish`.

        An error of the user's own rows, found when they are flushed, is raised as SQLAlchemy tells it.
        """
        if self._session is None:
            what = "finish"
            async with OpenTransaction(self._database, what) as opened:
                return await opened.run(what, lambda c: _end_or_conflict(c, finish, opened.now))
        return await self._finish_session(self._session, finish)

    async def _finish_session(self, session: AsyncSession, finish: Finish) -> list[PendingRow]:
        with anyio.move_on_after(self._database.deadline_s, shield=True):
            try:
                recorded = await _flushed(session)
                rows = await self._end_in(session, finish, recorded)
                await session.commit()
            except Exception as error:
                if lost_to_others(error):
                    raise translated(error, "finish") from error
                raise
            return rows
        raise Unavailable(
            f"finish: expected an answer of the database within {self._database.deadline_s:g} s, "
            "got none; it is not known whether the task is done"
        )

    async def _end_in(
        self, session: AsyncSession, finish: Finish, recorded: list[PendingRow]
    ) -> list[PendingRow]:
        connection = await session.connection()
        now = self._database.clock.now()
        try:
            return await connection.run_sync(
                lambda plain: _end_or_conflict(CoreExecutor(plain), finish, now, recorded)
            )
        except Exception as error:
            raise translated(error, "finish") from error

    async def __aenter__(self) -> Self:
        """Nothing is begun yet."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Rolls back whatever was not committed."""
        session, self._session = self._session, None
        if session is None:
            return
        with anyio.move_on_after(self._database.deadline_s, shield=True), suppress(Exception):
            # Whatever fails here, fails on a connection that SQLAlchemy then throws away.
            await session.close()


def _allow_waiting(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    del session
    if not transaction.nested:
        connection.exec_driver_sql(
            f"SET LOCAL idle_in_transaction_session_timeout = {SESSION_IDLE_TIMEOUT_MS}"
        )


async def _flushed(session: AsyncSession) -> list[PendingRow]:
    """Writes what the session holds; returns the outbox rows of its recorded events, if it has any."""
    await session.flush()
    write_events: Callable[[], Any] | None = getattr(session, "write_events", None)
    if write_events is None:
        return []
    rows: list[PendingRow] = await write_events()
    return rows


def _end_or_conflict(
    on: Executor, finish: Finish, now: int, recorded: list[PendingRow] | None = None
) -> list[PendingRow]:
    held, written = end(on, [finish], now)
    if not held:
        row = finish.task.row
        raise Conflict(
            f"finish: expected the lease {finish.task.token} of message {row.message_id} for "
            f"{row.consumer}, got none; it ran out and the task is another worker's; nothing was written"
        )
    return outbox.prefix(on, [*(recorded or []), *written])
