"""A connection of the pool for the time of one transaction: through SQLAlchemy, or the driver's own.

Each link begins, commits and rolls back by the same means as it runs statements, so SQLAlchemy and
the driver are never of two minds about an open transaction. Either way the connection comes from the
engine's pool, with its settings, and goes back there or is thrown away.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import PoolProxiedConnection, QueuePool, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import greenlet_spawn

from sagacity.backends.sql.executors import (
    KEEP_PLANS,
    AsyncpgExecutor,
    Compilation,
    CoreExecutor,
    Executor,
    SqliteExecutor,
    Watcher,
)
from sagacity.core.errors import Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

ASYNCPG, PSYCOPG, AIOSQLITE = "asyncpg", "psycopg", "aiosqlite"
"""Drivers that have links of their own, as SQLAlchemy calls them."""
KEPT_MAX = 4
"""Connections that are kept for batches, beside those of the pool."""
OPENED_AT = "sagacity_opened_at"
"""In the `info` of a pooled connection: when it was opened, by this machine's steady clock."""


class Link(ABC):
    """One transaction on one connection. Its methods raise whatever the driver raises."""

    autonomous = True
    """True where statements may come before `begin`, each a transaction of its own."""

    @property
    def taken(self) -> bool:
        """True once it has a connection."""
        return False

    def take_kept(self) -> bool:
        """Takes a connection that an earlier link has kept, if there is one."""
        return False

    def keep(self) -> bool:
        """Keeps the connection for a later link, if it may; then there is nothing to close."""
        return False

    @abstractmethod
    async def take(self) -> None:
        """Takes a connection."""

    @abstractmethod
    async def begin(self) -> None:
        """Begins. What is run on a connection before that is a transaction of its own."""

    @abstractmethod
    async def run(self, work: Callable[[Executor], T]) -> T:
        """Calls a function with what runs statements."""

    async def whole(self, work: Callable[[Executor], T]) -> T:
        """Begins, runs and commits. After an error it is unknown whether that was rolled back."""
        await self.begin()
        done = await self.run(work)
        await self.commit()
        return done

    @abstractmethod
    async def commit(self) -> None:
        """Commits."""

    @abstractmethod
    async def rollback(self) -> None:
        """Rolls back."""

    @abstractmethod
    async def close(self, *, broken: bool) -> None:
        """Gives the connection back; one that is `broken` is closed for good."""


class CoreLink(Link):
    """By SQLAlchemy, for every driver."""

    autonomous = False

    def __init__(self, engine: AsyncEngine, options: dict[str, Any]) -> None:
        """`options` are execution options of the connection."""
        self._engine, self._options = engine, options
        self._open: AsyncConnection | None = None

    @property
    def _connection(self) -> AsyncConnection:
        assert self._open is not None, "not begun"
        return self._open

    async def take(self) -> None:
        """See `Link`."""
        self._open = await self._engine.connect().start()
        await self._open.execution_options(**self._options)

    async def begin(self) -> None:
        """See `Link`."""
        await self._connection.begin()

    async def run(self, work: Callable[[Executor], T]) -> T:
        """See `Link`."""
        return await self._connection.run_sync(lambda plain: work(CoreExecutor(plain)))

    async def commit(self) -> None:
        """See `Link`."""
        await self._connection.commit()

    async def rollback(self) -> None:
        """See `Link`."""
        await self._connection.rollback()

    async def close(self, *, broken: bool) -> None:
        """See `Link`."""
        connection, self._open = self._open, None
        if connection is not None:
            if broken:
                await connection.invalidate()
            await connection.close()


class Kept(NamedTuple):
    """A connection that was taken out of the pool for good."""

    dbapi: DBAPIConnection
    opened_at: float
    era: int
    """`Direct.era` at that time."""
    process: int


class Direct:
    """What the direct links of one engine share."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        dialect = engine.sync_engine.dialect
        if engine.driver == PSYCOPG:
            from sagacity.backends.sql.psycopg_driver import PsycopgExecutor, array_of

            self.compiled = Compilation(dialect, array_of)
            self.executor: Callable[..., Executor] = PsycopgExecutor
        else:
            self.compiled = Compilation(dialect)
            self.executor = SqliteExecutor if engine.driver == AIOSQLITE else AsyncpgExecutor
        self.watcher: Watcher | None = None
        self.doubtful_until = 0.0
        """Connections opened before this may be as dead as the one that broke then."""
        self.kept: list[Kept] = []
        """Connections for batches that none uses now, the last used at the end."""
        self.era = 0
        """Goes up when all connections are to be closed; those in use then are not kept any more."""
        pool = engine.pool
        self.keeps = isinstance(pool, QueuePool)
        """False for a pool that keeps none itself, or has one for all: whoever chose it means that."""
        recycle_s: float = getattr(pool, "_recycle", -1)
        self.age_max_s = recycle_s if recycle_s >= 0 else float("inf")
        """Older connections are not kept, as the pool would not."""
        _let_go_with(engine, self)
        self.pooled_by_others = False
        """True where a pooler between us and PostgreSQL hands a session to many."""

    def told(self, text: str) -> None:
        """Tells the watcher of a statement without values."""
        if self.watcher is not None:
            self.watcher(text, (), False)

    def may_keep(self, kept: Kept) -> bool:
        """True while a connection is good for one more batch."""
        return kept.era == self.era and time.monotonic() - kept.opened_at <= self.age_max_s

    async def close(self) -> None:
        """Closes what is kept."""
        await greenlet_spawn(self.let_go)

    async def end(self, kept: Kept) -> None:
        """Closes one for good, whatever state it is in."""
        await greenlet_spawn(self._terminate, kept)

    def let_go(self) -> None:
        """Closes what is kept, and has what is in use closed when it is given back."""
        self.era += 1
        kept, self.kept = self.kept, []
        for one in kept:
            self._terminate(one)

    def _terminate(self, kept: Kept) -> None:
        if kept.process != os.getpid():
            return  # it is the parent's, who still speaks to the server
        try:
            self.engine.sync_engine.dialect.do_terminate(kept.dbapi)
        except Exception as error:  # noqa: BLE001 - as a pool does: nobody waits for it
            # It may be long gone, with its event loop.
            log.warning("Kept connection is not closed in order", extra={"error": str(error)})


def _let_go_with(engine: AsyncEngine, direct: Direct) -> None:
    """An engine that is disposed of closes its connections, before a fork or another event loop, say."""
    known = weakref.ref(direct)

    def disposed(_: object) -> None:
        if (one := known()) is not None:
            one.let_go()

    event.listen(engine.sync_engine, "engine_disposed", disposed)


class _DirectLink(Link):
    """By the driver's own connection.

    With `keeps` it is taken out of the pool for good, and kept for the next batch.
    """

    def __init__(self, direct: Direct, *, keeps: bool) -> None:
        self._direct = direct
        self._keeps = keeps and direct.keeps
        self._kept: Kept | None = None
        self._pooled: PoolProxiedConnection | None = None
        self._driver: Any = None

    @property
    def taken(self) -> bool:
        """See `Link`."""
        return self._driver is not None

    def take_kept(self) -> bool:
        """See `Link`."""
        if not self._keeps or not self._direct.kept:
            return False
        self._kept = kept = self._direct.kept.pop()
        self._driver = kept.dbapi.driver_connection
        if self._direct.may_keep(kept) and self._sound(kept.opened_at):
            return True
        self._direct.kept.insert(0, kept)  # whoever has time closes it
        self._kept = self._driver = None
        return False

    def keep(self) -> bool:
        """See `Link`."""
        direct = self._direct
        if self._kept is None or len(direct.kept) >= KEPT_MAX or not direct.may_keep(self._kept):
            return False
        self._direct.kept.append(self._kept)
        self._kept = self._driver = None
        return True

    async def take(self) -> None:
        """Takes a connection that nobody has reason to doubt."""
        while True:
            usable = True
            if self._keeps and self._direct.kept:
                self._kept = kept = self._direct.kept.pop()
                self._driver = kept.dbapi.driver_connection
                opened_at, usable = kept.opened_at, self._direct.may_keep(kept)
            else:
                self._pooled = pooled = await self._direct.engine.raw_connection()
                self._driver = pooled.driver_connection
                opened_at = pooled.info.setdefault(OPENED_AT, time.monotonic())
            if usable and self._sound(opened_at):
                break
            await self._throw_away()  # there are others, and the pool opens another one
        if self._keeps and self._kept is None:
            await self._adopt(opened_at)

    async def _adopt(self, opened_at: float) -> None:
        """Makes a connection of the pool one of ours."""
        pooled, self._pooled = self._pooled, None
        assert pooled is not None
        assert pooled.dbapi_connection is not None
        self._kept = Kept(pooled.dbapi_connection, opened_at, self._direct.era, os.getpid())
        pooled.detach()

    def _sound(self, opened_at: float) -> bool:
        del opened_at
        return True

    async def _throw_away(self) -> None:
        kept, pooled = self._kept, self._pooled
        self._kept = self._pooled = self._driver = None
        if kept is not None:
            await self._direct.end(kept)
        elif pooled is not None:
            await greenlet_spawn(pooled.invalidate)

    async def close(self, *, broken: bool) -> None:
        """See `Link`."""
        if broken or self._driver is None:
            if self._driver is not None:
                self._direct.doubtful_until = time.monotonic()
            await self._throw_away()
            return
        kept, pooled = self._kept, self._pooled
        self._kept = self._pooled = self._driver = None
        if pooled is not None:
            await greenlet_spawn(pooled.close)
        elif kept is not None:
            await self._direct.end(kept)


class PostgresqlLink(_DirectLink):
    """By asyncpg or psycopg, which work in the event loop; functions run in SQLAlchemy's greenlet."""

    def __init__(self, direct: Direct, *, keeps_plans: bool) -> None:
        """`keeps_plans`: statements are planned once, until `Executor.plan_anew`."""
        super().__init__(direct, keeps=keeps_plans and not direct.pooled_by_others)
        self._begin = "BEGIN"
        if keeps_plans and not self._keeps:
            self._set_each_time()

    def _set_each_time(self) -> None:
        self.autonomous = False
        self._begin = f"BEGIN; {KEEP_PLANS}"

    async def _adopt(self, opened_at: float) -> None:
        # With the settings of a transaction for all of the session, if that is ours: a session of a
        # pooler's serves others next.
        (backend,) = await self._fetch("SELECT pg_backend_pid()")
        if backend != self._backend():
            self._direct.pooled_by_others, self._keeps = True, False
            self._set_each_time()
            return
        await super()._adopt(opened_at)
        await self._say(KEEP_PLANS.replace("SET LOCAL", "SET SESSION"))

    def _sound(self, opened_at: float) -> bool:
        return opened_at >= self._direct.doubtful_until and not self._is_closed()

    @abstractmethod
    def _is_closed(self) -> bool: ...

    @abstractmethod
    def _backend(self) -> int:
        """The number of the server's process, as told when the connection was made."""

    @abstractmethod
    async def _say(self, text: str) -> str:
        """Runs statements without values; returns what the server says to the last of them."""

    @abstractmethod
    async def _fetch(self, text: str) -> tuple[Any, ...]:
        """The only row of a statement without values."""

    async def run(self, work: Callable[[Executor], T]) -> T:
        """See `Link`."""
        direct = self._direct
        return await greenlet_spawn(
            work, direct.executor(self._driver, direct.compiled, direct.watcher)
        )

    async def begin(self) -> None:
        """See `Link`."""
        await self._say(self._begin)

    async def commit(self) -> None:
        """See `Link`."""
        self._direct.told("COMMIT")
        if (done := await self._say("COMMIT")) != "COMMIT":
            raise Unavailable(f"commit: expected the server to say COMMIT, got {done}")

    async def rollback(self) -> None:
        """See `Link`."""
        await self._say("ROLLBACK")


class AsyncpgLink(PostgresqlLink):
    """By asyncpg's own connection."""

    def _is_closed(self) -> bool:
        return bool(self._driver.is_closed())

    def _backend(self) -> int:
        return int(self._driver.get_server_pid())

    async def _say(self, text: str) -> str:
        return str(await self._driver.execute(text))

    async def _fetch(self, text: str) -> tuple[Any, ...]:
        return tuple(await self._driver.fetchrow(text))


class PsycopgLink(PostgresqlLink):
    """By psycopg's own connection."""

    _borrowed = False
    """True where SQLAlchemy left it to begin transactions by itself, and finds it so again."""

    async def _say(self, text: str) -> str:
        await self._by_itself()
        cursor = await self._driver.execute(text)
        while cursor.nextset():
            pass
        return str(cursor.statusmessage)

    async def _fetch(self, text: str) -> tuple[Any, ...]:
        await self._by_itself()
        return tuple(await (await self._driver.execute(text)).fetchone())

    async def _by_itself(self) -> None:
        if not self._driver.autocommit:
            self._borrowed = True
            await self._driver.set_autocommit(True)  # or it begins transactions of its own

    def _is_closed(self) -> bool:
        return bool(self._driver.closed)

    def _backend(self) -> int:
        return int(self._driver.info.backend_pid)

    async def close(self, *, broken: bool) -> None:
        """See `Link`."""
        if self._pooled is not None and self._borrowed and not broken:
            await self._driver.set_autocommit(False)
        await super().close(broken=broken)


class AiosqliteLink(_DirectLink):
    """By the connection of the standard library that aiosqlite keeps in a thread.

    A whole function is handed to the thread in one go.
    """

    def __init__(self, direct: Direct, *, read_only: bool, keeps: bool) -> None:
        """`keeps`: its connection stays open for the next batch."""
        super().__init__(direct, keeps=keeps)
        self._begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"

    async def begin(self) -> None:
        """See `Link`."""
        await self.run(lambda _: self._script(self._begin))

    async def run(self, work: Callable[[Executor], T]) -> T:
        """See `Link`."""
        direct, driver = self._direct, self._driver
        # Its public methods cost a trip to the thread and back for each statement.
        executor = direct.executor(driver._conn, direct.compiled, direct.watcher)  # noqa: SLF001
        done: T = await driver._execute(work, executor)  # noqa: SLF001
        return done

    async def whole(self, work: Callable[[Executor], T]) -> T:
        """See `Link`; one trip to the thread."""
        return await self.run(lambda on: self._whole(on, work))

    def _whole(self, on: Executor, work: Callable[[Executor], T]) -> T:
        self._script(self._begin)
        done = work(on)
        self._script("COMMIT")
        return done

    async def commit(self) -> None:
        """See `Link`."""
        await self.run(lambda _: self._script("COMMIT"))

    async def rollback(self) -> None:
        """See `Link`."""
        await self.run(lambda _: self._script("ROLLBACK"))

    def _script(self, text: str) -> None:
        self._direct.told(text)
        connection: sqlite3.Connection = self._driver._conn  # noqa: SLF001
        connection.execute(text)
