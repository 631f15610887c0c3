"""Safe settings on every connection, errors that say what to do, time from the database."""

from __future__ import annotations

import threading
import time
from typing import Any

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sagacity.backends.sql import DatabaseClock, SqlStore
from sagacity.backends.sql.database import Database, open_engine
from sagacity.core.errors import (
    ConfigurationError,
    DataRefused,
    StoreError,
    Unavailable,
)
from sagacity.core.plan import Plan
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import (
    Workers,
    correlation,
    inbox,
    instance,
    outbox,
    parked,
    timeout,
    workers,
)
from tests.backends.sql.test_store_postgres import PostgresDatabase
from tests.backends.sql.test_store_sqlite import SqliteFile
from tests.waiting import async_eventually

pytestmark = pytest.mark.asyncio

SECRET = "s3cr3t-w0rd"


def database_at(url: str) -> SqliteFile | PostgresDatabase:
    return SqliteFile(url) if url.startswith("sqlite") else PostgresDatabase(url)


# --- settings ------------------------------------------------------------------------------------


@pytest.fixture(params=["postgres_url", "psycopg_url"])
def server_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


async def test_postgresql_connections_are_safe(server_url: str) -> None:
    engine = open_engine(server_url)
    try:
        async with engine.connect() as connection:
            expected = {
                "plan_cache_mode": "force_custom_plan",
                "jit": "off",
                "lock_timeout": "5s",
                "statement_timeout": "30s",
                "idle_in_transaction_session_timeout": "15s",
                "synchronous_commit": "on",
                "transaction_isolation": "read committed",
            }
            found = {}
            for name in expected:
                found[name] = (await connection.execute(text(f"SHOW {name}"))).scalar_one()
            assert found == expected
    finally:
        await engine.dispose()


async def test_a_careless_database_default_is_put_right(postgres_url: str) -> None:
    careless = create_async_engine(
        postgres_url,
        connect_args={"server_settings": {"synchronous_commit": "off"}},
    )
    store = SqlStore(careless)  # an engine of the application's own
    try:
        async with careless.connect() as connection:
            shown = await connection.execute(text("SHOW synchronous_commit"))
            assert shown.scalar_one() == "on"
        await store.close()
        async with careless.connect() as connection:  # close() left it usable
            assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
    finally:
        await careless.dispose()


async def test_sqlite_connections_are_safe(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    try:
        async with engine.connect() as connection:
            expected = {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 10_000}
            for name, value in expected.items():
                found = await connection.exec_driver_sql(f"PRAGMA {name}")
                assert found.scalar_one() == value
    finally:
        await engine.dispose()


async def test_read_modify_write_loses_nothing(store_url: str) -> None:
    """SQLAlchemy's default on SQLite ends at 1 here, without any error."""
    store = SqlStore(store_url, clock=VirtualClock())
    await store.prepare(create=True)
    total = 30

    async def add_one() -> None:
        async with store.transaction() as transaction:
            loaded = await transaction.load({"Order": ["o1"]}, wait=True)
            before = loaded.instances["Order", "o1"]
            after = instance(version=before.version + 1)
            await transaction.write(Plan(now=0, saga_updates=[(after, before.version)]))

    try:
        async with store.transaction() as transaction:
            await transaction.write(Plan(now=0, saga_inserts=[instance(version=0)]))
        async with anyio.create_task_group() as group:
            for _ in range(total):
                group.start_soon(add_one)
        found = await store.saga("Order", "o1")
        assert found is not None
        assert found.version == total
    finally:
        await store.close()


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("no url at all", "expected a URL such as sqlite"),
        ("mysql+asyncmy://u@h/d", "got 'mysql'"),
        (f"postgresql+psycopg2://u:{SECRET}@h/d", "asyncpg or psycopg"),
        (f"postgresql://u:{SECRET}@h/d", "got none; write postgresql\\+asyncpg"),
        ("sqlite:///file.db", "write sqlite\\+aiosqlite"),
        ("sqlite+aiosqlite://", "in memory"),
        ("sqlite+aiosqlite:///:memory:", "in memory"),
    ],
)
async def test_a_wrong_url_is_told(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        SqlStore(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_an_unreachable_server_is_unavailable(driver: str, free_port: int) -> None:
    url = f"postgresql+{driver}://user:{SECRET}@127.0.0.1:{free_port}/name"
    store = SqlStore(url)
    try:
        for action in (store.prepare, lambda: store.due(["Order"], 1), lambda: store.append([])):
            with pytest.raises(Unavailable, match="cannot be reached") as caught:
                await action()
            assert SECRET not in str(caught.value)
        with pytest.raises(Unavailable):
            async with store.transaction():
                raise AssertionError("it cannot have begun")
    finally:
        await store.close()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_missing_database_is_unavailable(
    driver: str, postgres_url: str, psycopg_url: str
) -> None:
    url = postgres_url if driver == "asyncpg" else psycopg_url
    store = SqlStore(f"{url}_that_is_not_there")
    try:
        with pytest.raises(Unavailable, match="does not exist"):
            await store.prepare()
    finally:
        await store.close()


async def test_an_sqlite_file_that_cannot_be_opened_is_unavailable(tmp_path: Any) -> None:
    store = SqlStore(f"sqlite+aiosqlite:///{tmp_path / 'no' / 'such' / 'directory.db'}")
    try:
        with pytest.raises(Unavailable, match="unable to open"):
            await store.prepare(create=True)
    finally:
        await store.close()
        # The driver's thread reports its end to the event loop, which must still be there then.
        await async_eventually(_no_driver_thread, "the end of the driver's thread")


async def _no_driver_thread() -> bool:
    return not any("_connection_worker_thread" in thread.name for thread in threading.enumerate())


# --- refused values ------------------------------------------------------------------------------

LONE = "lone \ud800 surrogate"
TOO_LARGE = 2**63


@pytest.mark.parametrize(
    "lists",
    [
        {"saga_inserts": [instance(version=TOO_LARGE)]},
        {"saga_inserts": [instance(LONE)]},
        {"saga_inserts": [instance(state=LONE)]},
        {"saga_inserts": [instance(schema_version=2**63)]},
        {"saga_updates": [(instance(updated_at=-TOO_LARGE - 1), 1)]},
        {"inbox": [inbox(LONE)]},
        {"outbox": [outbox(LONE)]},
        {"outbox": [outbox("c1", LONE)]},
        {"timeouts": [timeout(due_at=TOO_LARGE)]},
        {"timeouts": [timeout(LONE)]},
        {"correlations": [correlation(LONE)]},
        {"parked": [parked(sequence=TOO_LARGE)]},
        {"parked": [parked(lane=LONE)]},
    ],
    ids=lambda lists: f"{next(iter(lists))}",
)
async def test_a_refused_value_is_the_same_error_everywhere(
    store_url: str, lists: dict[str, Any]
) -> None:
    async with workers(database_at(store_url)) as w:
        await w.write(saga_inserts=[instance("there before")])
        with pytest.raises(DataRefused):
            await w.write(**{"inbox": [inbox("good")], **lists})
        assert (await w.known(inbox=[("Order", "good")])).seen == set()
        assert (await w.load("there before")).keys() == {"there before"}
        await w.write(saga_inserts=[instance("afterwards")])


async def test_postgresql_refuses_nul_in_text_only(store_url: str) -> None:
    """Ids, keys and payloads are bytes; state names are text and come from the code."""
    async with workers(database_at(store_url)) as w:
        await w.write(
            saga_inserts=[instance("nul\x00key", uid="nul\x00uid")],
            inbox=[inbox("nul\x00id")],
            correlations=[correlation("nul\x00value", "nul\x00key")],
        )
        assert (await w.load("nul\x00key", "nul")).keys() == {"nul\x00key"}
        assert (await w.known(inbox=[("Order", "nul"), ("Order", "nul\x00id")])).seen == {
            ("Order", "nul\x00id")
        }
        assert await w.correlated("nul\x00value") == ("nul\x00key",)
        assert await w.correlated("nul") == ()
        if store_url.startswith("postgresql"):
            with pytest.raises(DataRefused):
                await w.write(saga_inserts=[instance("o2", state="nul\x00state")])


async def test_no_value_is_shown_in_an_error(store_url: str) -> None:
    async with workers(database_at(store_url)) as w:
        bad = instance("key", version=TOO_LARGE, data=SECRET.encode(), state=SECRET)
        with pytest.raises(StoreError) as caught:
            await w.write(saga_inserts=[bad])
        error: BaseException | None = caught.value
        while error is not None:  # the whole chain may end in a log
            assert SECRET not in str(error)
            error = error.__cause__


# --- time ----------------------------------------------------------------------------------------


async def test_the_clock_follows_the_database(store_url: str) -> None:
    clock = DatabaseClock()
    clock._offset_us += 3_600_000_000  # this machine's clock is an hour ahead
    assert clock.now() - time.time_ns() // 1000 > 3_500_000_000
    store = SqlStore(store_url, clock=clock)
    try:
        await store.prepare(create=True)
        assert not clock.stale
        assert abs(clock.now() - time.time_ns() // 1000) < 5_000_000
        assert store.clock is clock
        async with store.transaction() as transaction:
            assert abs(transaction.now - clock.now()) < 5_000_000
    finally:
        await store.close()


async def test_a_look_at_the_clock_is_taken_only_now_and_then(postgres_url: str) -> None:
    from tests.backends.sql.statement_log import logged

    clock = DatabaseClock(every_s=3600)
    store = SqlStore(postgres_url, clock=clock)
    try:
        await store.prepare(create=True)
        with logged(store) as statements:
            async with store.transaction() as transaction:
                assert transaction.now <= clock.now()
                await transaction.load({"Order": ["o1"]})
        assert [one.sql.split()[0] for one in statements] == ["SELECT", "COMMIT"]
        clock._set_at = None
        with logged(store) as statements:
            async with store.transaction():
                pass
        assert "clock_timestamp" in statements[0].sql
    finally:
        await store.close()


# --- deadlines and cancellation ------------------------------------------------------------------


async def test_what_never_answers_is_given_up(postgres_url: str) -> None:
    database = Database(open_engine(postgres_url), VirtualClock(), deadline_s=0.2, owned=True)
    try:
        with pytest.raises(Unavailable, match=r"within 0\.2 s"):
            await database.write("nap", lambda c: c.execute(text("SELECT pg_sleep(30)")))
        assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await database.close()


async def test_cancellation_leaks_nothing(store_url: str) -> None:
    async with workers(database_at(store_url)) as w:
        await w.write(saga_inserts=[instance()])
        for step in range(40):
            with anyio.move_on_after(step / 4000):
                async with w.first.transaction() as transaction:
                    loaded = await transaction.load({"Order": ["o1"]}, wait=True)
                    before = loaded.instances["Order", "o1"]
                    after = instance(version=before.version + 1)
                    await transaction.write(Plan(now=0, saga_updates=[(after, before.version)]))
        await _still_sound(w)


async def _still_sound(w: Workers) -> None:
    store = w.first
    assert isinstance(store, SqlStore)
    assert store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    before = (await w.load("o1"))["o1"]
    await w.write(saga_updates=[(instance(version=before.version + 1), before.version)])
    if store.engine.dialect.name == "postgresql":
        async with store.engine.connect() as connection:
            idle = await connection.execute(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' "
                    "AND datname = current_database()"
                )
            )
            assert idle.scalar_one() == 0
