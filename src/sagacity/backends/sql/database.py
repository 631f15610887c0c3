"""Connections: opened with safe settings, used under deadlines, given up when in doubt."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from sagacity.backends.sql.clock import DatabaseClock
from sagacity.backends.sql.dialects import POSTGRESQL, SQLITE, UNHEX, Dialect, dialect_named
from sagacity.backends.sql.errors import translated
from sagacity.backends.sql.executors import CoreExecutor, Executor
from sagacity.backends.sql.links import (
    AIOSQLITE,
    ASYNCPG,
    OPENED_AT,
    PSYCOPG,
    AiosqliteLink,
    AsyncpgLink,
    CoreLink,
    Direct,
    Link,
    PsycopgLink,
)
from sagacity.backends.sql.turns import Turn, Turns
from sagacity.core.errors import ConfigurationError, Unavailable
from sagacity.ports import Clock

T = TypeVar("T")

DRIVERS = {"sqlite": "aiosqlite", "postgresql": "asyncpg or psycopg"}
READ_ONLY = "sagacity_read_only"
"""Execution option of a connection that will not write: SQLite then need not wait for writers."""
TURN = "sagacity_turn"
"""Execution option that holds the `Turn` to take before a transaction that may write begins."""
TURNS = "sagacity_turns"
"""Execution option of an engine each of whose transactions takes a turn in these `Turns`."""

BUSY_TIMEOUT_MS = 10_000
LOCK_TIMEOUT_MS = 5_000
STATEMENT_TIMEOUT_MS = 30_000
IDLE_TIMEOUT_MS = 15_000
SESSION_IDLE_TIMEOUT_MS = 120_000
"""For the session of a participant, who may wait for the outside world between two statements."""
CONNECT_TIMEOUT_S = 5

_POSTGRESQL_SETTINGS = f"""
SELECT set_config('plan_cache_mode', 'force_custom_plan', false),
       set_config('jit', 'off', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('lock_timeout', '{LOCK_TIMEOUT_MS}', false),
       set_config('statement_timeout', '{STATEMENT_TIMEOUT_MS}', false),
       set_config('idle_in_transaction_session_timeout', '{IDLE_TIMEOUT_MS}', false),
       set_config('synchronous_commit',
                  CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
                       ELSE current_setting('synchronous_commit') END, false)
"""
# A plan made while a table was empty must not stay (protocol.md M14b), and none of our statements is
# worth compiling; a frozen worker must not hold its locks for ever (row 65); a commit that was
# acknowledged must be on disk (row 67).


def open_engine(url: str | URL) -> AsyncEngine:
    """An engine with this store's settings.

    Raises ConfigurationError where the URL is no URL, names a database or driver that the store does
    not work with, a driver that is not installed, or a database in memory.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(
            "store: expected a URL such as sqlite+aiosqlite:///saga.db or "
            "postgresql+asyncpg://user@host/name, got something that is none"
        ) from error
    kind = parsed.get_backend_name()
    dialect_named(kind)
    driver = parsed.drivername.partition("+")[2]
    if driver not in DRIVERS[kind].split(" or "):
        raise ConfigurationError(
            f"store {_shown(parsed)}: expected an asyncio driver ({DRIVERS[kind]}), "
            f"got {driver or 'none'}; write {kind}+{DRIVERS[kind].split()[0]}://"
        )
    if kind == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise ConfigurationError(
            f"store {_shown(parsed)}: expected an SQLite file, got a database in memory, which has "
            "only one connection; name a file, or use the store memory:"
        )
    options: dict[str, Any] = {"pool_size": 10, "max_overflow": 20, "hide_parameters": True}
    if driver == "asyncpg":
        options["connect_args"] = {"timeout": CONNECT_TIMEOUT_S}
    elif driver == "psycopg":
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    try:
        engine = create_async_engine(parsed, **options)
    except ImportError as error:
        extra = {"asyncpg": "postgres"}.get(driver, driver)
        raise ConfigurationError(
            f"store {_shown(parsed)}: the driver {driver} is not installed; "
            f'run: pip install "sagacity[{extra}]"'
        ) from error
    configure(engine)
    return engine


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def configure(engine: AsyncEngine) -> None:
    """Gives the connections of an engine the settings that the store's promises rest on.

    Safe to call twice. Connections that are open already keep theirs.
    """
    sync = engine.sync_engine
    if dialect_named(sync.dialect.name) is POSTGRESQL:
        _listen(sync, "connect", _set_up_postgresql)
    else:
        _listen(sync, "connect", _set_up_sqlite)
        _listen(sync, "begin", _begin_sqlite)
        _listen(sync, "checkin", _end_turn)


def _listen(target: Any, name: str, listener: Callable[..., None]) -> None:
    if not event.contains(target, name, listener):
        event.listen(target, name, listener)


def _set_up_postgresql(connection: DBAPIConnection, record: Any) -> None:
    record.info[OPENED_AT] = time.monotonic()
    cursor = connection.cursor()
    cursor.execute(_POSTGRESQL_SETTINGS)
    cursor.close()
    connection.commit()


def _set_up_sqlite(connection: Any, record: object) -> None:
    del record
    # The driver would begin a transaction only at the first write, after our reads (protocol.md M13).
    connection.isolation_level = None
    connection.create_function(UNHEX, 1, bytes.fromhex, deterministic=True)
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get(READ_ONLY, False):
        connection.exec_driver_sql("BEGIN")
        return
    turn: Turn | None = options.get(TURN)
    turns: Turns | None = options.get(TURNS)
    if turn is None and turns is not None:
        # A session of the user's: its turn is over when it gives its connection back.
        kept = connection.connection.record_info
        assert kept is not None
        turn = kept.setdefault(TURN, Turn(turns))
    if turn is not None:
        await_only(turn.take())
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _end_turn(connection: object, record: Any) -> None:
    del connection
    turn: Turn | None = record.record_info.pop(TURN, None)
    if turn is not None:
        turn.give_up()


class Database:
    """One database: runs functions of a `Connection` under a deadline and translates errors."""

    def __init__(
        self, engine: AsyncEngine, clock: Clock | None, *, deadline_s: float, owned: bool
    ) -> None:
        """`owned`: close the engine with the store."""
        self.engine = engine
        self.dialect: Dialect = dialect_named(engine.dialect.name)
        self.clock: Clock = clock or DatabaseClock()
        self.deadline_s = deadline_s
        self.turns = Turns(BUSY_TIMEOUT_MS / 1000) if self.dialect is SQLITE else None
        self.direct = _direct(engine)
        self._owned = owned

    async def read(self, what: str, work: Callable[[Connection], T]) -> T:
        """Runs `work` on a connection of SQLAlchemy that will not write."""
        async with OpenTransaction(self, what, read_only=True, core=True) as transaction:
            return await transaction.run_core(what, work)

    async def write(self, what: str, work: Callable[[Connection], T]) -> T:
        """Runs `work` in a transaction of SQLAlchemy's and commits it."""
        async with OpenTransaction(self, what, core=True) as transaction:
            return await transaction.run_core(what, work)

    async def query(self, what: str, work: Callable[[Executor], T]) -> T:
        """Runs `work`, which will not write, the shortest way to the database."""
        async with OpenTransaction(self, what, read_only=True) as transaction:
            return await transaction.run(what, work)

    def link(self, turn: Turn | None, *, read_only: bool, core: bool, keeps_plans: bool) -> Link:
        """A link for one transaction: the driver's own where there is one, unless `core`."""
        if core or self.direct is None:
            return CoreLink(self.engine, {READ_ONLY: read_only, TURN: turn})
        if self.dialect is SQLITE:
            return AiosqliteLink(self.direct, read_only=read_only, keeps=keeps_plans)
        link = PsycopgLink if self.engine.driver == PSYCOPG else AsyncpgLink
        return link(self.direct, keeps_plans=keeps_plans)

    async def bounded(self, what: str, action: Callable[[], Awaitable[T]]) -> T:
        """Awaits `action` shielded from cancellation, for at most the deadline.

        A cancelled statement leaves its transaction in doubt and drivers in disorder, so we wait: the
        server's own timeouts end what hangs, and the deadline what never answers.
        """
        with anyio.move_on_after(self.deadline_s, shield=True):
            try:
                return await action()
            except Exception as error:
                known = translated(error, what)
                if known is error:
                    raise
                raise known from error
        raise Unavailable(
            f"{what}: expected an answer of the database within {self.deadline_s:g} s, got none; "
            "the connection was given up"
        )

    async def close(self) -> None:
        """Closes the connections that are ours, and the engine if it is."""
        with anyio.move_on_after(self.deadline_s, shield=True):
            if self.direct is not None:
                await self.direct.close()
            if self._owned:
                await self.engine.dispose()


def _direct(engine: AsyncEngine) -> Direct | None:
    """For engines whose driver we speak to; a statement that SQLAlchemy must rewrite needs SQLAlchemy."""
    rewritten = "schema_translate_map" in engine.get_execution_options()
    known = engine.driver in {ASYNCPG, PSYCOPG, AIOSQLITE}
    return Direct(engine) if known and not rewritten else None


def _core(on: Executor) -> Connection:
    assert isinstance(on, CoreExecutor)
    return on.connection


class OpenTransaction:
    """A connection inside a transaction. Leaving commits; an exception rolls back.

    Once something has failed in it, it can only roll back: leaving then raises that error, whether or
    not it was caught inside.
    """

    def __init__(
        self,
        database: Database,
        what: str,
        *,
        read_only: bool = False,
        core: bool = False,
        keeps_plans: bool = False,
        optimistic: bool = False,
    ) -> None:
        """`core`: by a connection of SQLAlchemy, whatever the driver.

        `keeps_plans`: the best plans of its statements are the same for tables of any size.
        `optimistic`: begins only when told to, or to write.
        """
        self._database = database
        self._what = what
        self._read_only = read_only
        self._turn = Turn(database.turns) if database.turns and not read_only else None
        self._link: Link | None = database.link(
            self._turn, read_only=read_only, core=core, keeps_plans=keeps_plans
        )
        self._optimistic = optimistic
        self._failure: Exception | None = None
        self.begun = False
        """True once a transaction is open."""
        self.now = 0
        """The store's time at the begin."""

    @property
    def dialect(self) -> Dialect:
        """The kind of the database."""
        return self._database.dialect

    async def __aenter__(self) -> Self:
        """Connects and begins."""
        clock, link = self._database.clock, self._link
        stale = isinstance(clock, DatabaseClock) and clock.stale
        if self._optimistic and link is not None and link.take_kept() and not stale:
            self.now = clock.now()
            return self  # nobody had to be asked anything
        try:
            await self._database.bounded(f"{self._what}: begin", self._enter)
        except BaseException:
            await self._give_back(broken=True)
            raise
        return self

    async def _enter(self) -> None:
        assert self._link is not None
        if not self._optimistic:
            await self._take_turn()
        if not self._link.taken:
            await self._link.take()
        if not self._optimistic or not self._link.autonomous:
            await self._begin()
        clock = self._database.clock
        if isinstance(clock, DatabaseClock) and clock.stale:
            await self._link.run(clock.look)
        self.now = clock.now()

    async def _take_turn(self) -> None:
        if self._turn is not None:
            await self._turn.take()

    async def _begin(self) -> None:
        assert self._link is not None
        await self._take_turn()
        self.begun = True  # or about to be: who is cut off meanwhile must roll back
        await self._link.begin()

    async def begin(self) -> None:
        """Begins an optimistic one after all."""
        await self._bounded(f"{self._what}: begin", self._begin)

    async def run(self, what: str, work: Callable[[Executor], T]) -> T:
        """Runs a function of what sends statements inside this transaction."""
        return await self._bounded(what, lambda: self._open(what).run(work))

    async def run_whole(self, what: str, work: Callable[[Executor], T]) -> T:
        """Begins an optimistic one, runs a function, and commits."""

        async def whole() -> T:
            await self._take_turn()
            self.begun = True
            return await self._open(what).whole(work)

        done = await self._bounded(what, whole)
        self.begun = False
        return done

    async def _bounded(self, what: str, action: Callable[[], Awaitable[T]]) -> T:
        self._open(what)
        try:
            return await self._database.bounded(what, action)
        except Exception as error:
            self._failure = error
            raise

    def _open(self, what: str) -> Link:
        if self._link is None:
            raise Unavailable(f"{what}: the transaction has ended")
        return self._link

    async def run_core(self, what: str, work: Callable[[Connection], T]) -> T:
        """Runs a function of SQLAlchemy's connection; for a transaction that is `core`."""
        return await self.run(what, lambda on: work(_core(on)))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the transaction. Raises Unavailable where it is unknown whether it committed."""
        link = self._link
        if link is None:
            return
        ended = False
        try:
            if not self.begun:
                # Each statement was a transaction of its own. Who gave no answer is not asked again.
                ended = not isinstance(self._failure, Unavailable)
            elif error is None and self._failure is None and not self._read_only:
                await self._database.bounded(f"{self._what}: commit", link.commit)
                ended = True
            elif not isinstance(error or self._failure, Unavailable):
                ended = await self._rolled_back(link)
        finally:
            await self._give_back(broken=not ended)
        if error is None and self._failure is not None:
            raise self._failure

    async def _rolled_back(self, link: Link) -> bool:
        try:
            await self._database.bounded(f"{self._what}: rollback", link.rollback)
        except Exception:  # noqa: BLE001 - the first error is the one to tell; this connection goes
            return False
        return True

    async def _give_back(self, *, broken: bool) -> None:
        link, self._link = self._link, None
        try:
            if link is not None and (broken or not link.keep()):
                with anyio.move_on_after(self._database.deadline_s, shield=True):
                    await link.close(broken=broken)
        finally:
            if self._turn is not None:
                self._turn.give_up()
