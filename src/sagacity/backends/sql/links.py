"""A connection of the pool for the time of one transaction: through SQLAlchemy, or the driver's own.

Each link begins, commits and rolls back by the same means as it runs statements, so SQLAlchemy and
the driver are never of two minds about an open transaction. Either way the connection comes from the
engine's pool, with its settings, and goes back there or is thrown away.
"""

from __future__ import annotations

import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import PoolProxiedConnection
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

T = TypeVar("T")

ASYNCPG, PSYCOPG, AIOSQLITE = "asyncpg", "psycopg", "aiosqlite"
"""Drivers that have links of their own, as SQLAlchemy calls them."""
OPENED_AT = "sagacity_opened_at"
"""In the `info` of a pooled connection: when it was opened, by this machine's steady clock."""


class Link(ABC):
    """One transaction on one connection. Its methods raise whatever the driver raises."""

    @abstractmethod
    async def begin(self) -> None:
        """Takes a connection and begins."""

    @abstractmethod
    async def run(self, work: Callable[[Executor], T]) -> T:
        """Calls a function with what runs statements in this transaction."""

    @abstractmethod
    async def commit(self) -> None:
        """Commits."""

    @abstractmethod
    async def rollback(self) -> None:
        """Rolls back."""

    @abstractmethod
    async def close(self, *, broken: bool) -> None:
        """Gives the connection back to the pool; one that is `broken` is closed for good."""


class CoreLink(Link):
    """By SQLAlchemy, for every driver."""

    def __init__(self, engine: AsyncEngine, options: dict[str, Any]) -> None:
        """`options` are execution options of the connection."""
        self._engine, self._options = engine, options
        self._open: AsyncConnection | None = None

    @property
    def _connection(self) -> AsyncConnection:
        assert self._open is not None, "not begun"
        return self._open

    async def begin(self) -> None:
        """See `Link`."""
        self._open = await self._engine.connect().start()
        await self._open.execution_options(**self._options)
        await self._open.begin()

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

    def told(self, text: str) -> None:
        """Tells the watcher of a statement without values."""
        if self.watcher is not None:
            self.watcher(text, (), False)


class _DirectLink(Link):
    """By the driver's own connection, which the pool still owns."""

    def __init__(self, direct: Direct) -> None:
        self._direct = direct
        self._pooled: PoolProxiedConnection | None = None
        self._driver: Any = None

    async def _take(self) -> None:
        """Takes a connection that nobody has reason to doubt."""
        while True:
            pooled = self._pooled = await self._direct.engine.raw_connection()
            self._driver = pooled.driver_connection
            if self._sound(pooled):
                return
            await self._throw_away()  # the pool opens another one in its place

    def _sound(self, pooled: PoolProxiedConnection) -> bool:
        del pooled
        return True

    async def _throw_away(self) -> None:
        pooled, self._pooled, self._driver = self._pooled, None, None
        if pooled is not None:
            await greenlet_spawn(pooled.invalidate)

    async def close(self, *, broken: bool) -> None:
        """See `Link`."""
        if broken:
            if self._pooled is not None:
                self._direct.doubtful_until = time.monotonic()
            await self._throw_away()
        elif self._pooled is not None:
            pooled, self._pooled, self._driver = self._pooled, None, None
            await greenlet_spawn(pooled.close)


class _PostgresqlLink(_DirectLink):
    """By a driver that works in the event loop; its functions run in SQLAlchemy's greenlet."""

    def _sound(self, pooled: PoolProxiedConnection) -> bool:
        opened: float = pooled.info.setdefault(OPENED_AT, time.monotonic())
        return opened >= self._direct.doubtful_until and not self._is_closed()

    @abstractmethod
    def _is_closed(self) -> bool: ...

    async def run(self, work: Callable[[Executor], T]) -> T:
        """See `Link`."""
        direct = self._direct
        return await greenlet_spawn(
            work, direct.executor(self._driver, direct.compiled, direct.watcher)
        )


class AsyncpgLink(_PostgresqlLink):
    """By asyncpg's own connection."""

    def __init__(self, direct: Direct, *, keeps_plans: bool) -> None:
        """`keeps_plans`: statements are planned once, until `Executor.plan_anew`."""
        super().__init__(direct)
        self._begin = f"BEGIN; {KEEP_PLANS}" if keeps_plans else "BEGIN"

    def _is_closed(self) -> bool:
        return bool(self._driver.is_closed())

    async def begin(self) -> None:
        """See `Link`."""
        await self._take()
        await self._driver.execute(self._begin)

    async def commit(self) -> None:
        """See `Link`."""
        self._direct.told("COMMIT")
        if (done := await self._driver.execute("COMMIT")) != "COMMIT":
            raise Unavailable(f"commit: expected the server to say COMMIT, got {done}")

    async def rollback(self) -> None:
        """See `Link`."""
        await self._driver.execute("ROLLBACK")


class PsycopgLink(_PostgresqlLink):
    """By psycopg's own connection, which begins by itself."""

    def __init__(self, direct: Direct, *, keeps_plans: bool) -> None:
        """`keeps_plans`: as for `AsyncpgLink`."""
        super().__init__(direct)
        self._keeps_plans = keeps_plans

    def _is_closed(self) -> bool:
        return bool(self._driver.closed)

    async def begin(self) -> None:
        """See `Link`."""
        await self._take()
        if self._keeps_plans:
            await self._driver.execute(KEEP_PLANS)

    async def commit(self) -> None:
        """See `Link`."""
        self._direct.told("COMMIT")
        await self._driver.commit()

    async def rollback(self) -> None:
        """See `Link`."""
        await self._driver.rollback()


class AiosqliteLink(_DirectLink):
    """By the connection of the standard library that aiosqlite keeps in a thread.

    A whole function is handed to the thread in one go.
    """

    def __init__(self, direct: Direct, *, read_only: bool) -> None:
        super().__init__(direct)
        self._begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"

    async def begin(self) -> None:
        """See `Link`."""
        await self._take()
        await self.run(lambda _: self._script(self._begin))

    async def run(self, work: Callable[[Executor], T]) -> T:
        """See `Link`."""
        direct, driver = self._direct, self._driver
        # Its public methods cost a trip to the thread and back for each statement.
        executor = direct.executor(driver._conn, direct.compiled, direct.watcher)  # noqa: SLF001
        done: T = await driver._execute(work, executor)  # noqa: SLF001
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
