"""How many statements a batch takes, and what the database does for the ones that are repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.database import OpenTransaction
from sagacity.backends.sql.tables import metadata
from sagacity.backends.sql.tables import parked as parked_table
from sagacity.core.plan import Plan
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import inbox, instance, outbox, parked, timeout
from sagacity.testing.conformance.tasks import GAP, LEASE, work
from tests.backends.sql.statement_log import Statement, logged, one_batch
from tests.waiting import async_eventually

pytestmark = pytest.mark.asyncio

HISTORY = 100_000
"""Rows of each of the tables that grow."""
GROWING = tuple(
    f"sagacity_{name}" for name in ("outbox", "inbox", "saga", "lane", "tombstone", "transition")
)


async def test_the_number_of_statements_does_not_depend_on_the_batch(store_url: str) -> None:
    store = SqlStore(store_url, clock=VirtualClock())
    try:
        await store.prepare(create=True)
        with logged(store) as few:
            await one_batch(store, 4)
        with logged(store) as many:
            await one_batch(store, 300, base=1000)
        assert [one.sql for one in few] == [one.sql for one in many]
        start = [one.sql for one in few].index("COMMIT") + 1
        most = {"sqlite": 28, "postgresql": 21}[store.engine.dialect.name]
        assert len(few[start:]) <= most, "\n".join(one.sql for one in few[start:])
    finally:
        await store.close()


async def test_a_batch_writes_only_what_it_has(store_url: str) -> None:
    store = SqlStore(store_url, clock=VirtualClock())
    try:
        await store.prepare(create=True)
        with logged(store) as statements:
            async with store.transaction() as transaction:
                await transaction.load({"Order": ["o1"]})
                await transaction.known([("Order", "m1")])
                await transaction.write(
                    Plan(
                        now=0, saga_inserts=[instance()], inbox=[inbox()], outbox=[outbox("c", "l")]
                    )
                )
        most = {"sqlite": 11, "postgresql": 4}[store.engine.dialect.name]
        assert len(statements) <= most, "\n".join(one.sql for one in statements)
    finally:
        await store.close()


# --- the cost of polling (R35) -------------------------------------------------------------------


@pytest.mark.requirement("R35")
@pytest.mark.slow
async def test_polling_costs_the_same_whatever_the_history(store_url: str) -> None:
    await _polling_is_cheap(store_url, HISTORY)


@pytest.mark.requirement("R35")
@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url"])
async def test_polling_costs_the_same_after_a_million(
    database: str, request: pytest.FixtureRequest
) -> None:
    await _polling_is_cheap(str(request.getfixturevalue(database)), 10 * HISTORY)


async def _polling_is_cheap(store_url: str, many: int) -> None:
    store = SqlStore(store_url, clock=VirtualClock())
    try:
        await store.prepare(create=True)
        async with store.transaction() as transaction:
            await transaction.write(_something_of_everything(transaction.now))
        await _fill(store.engine, many)
        await _analyze(store.engine)
        with logged(store) as statements:
            await _poll(store)
        polls = [
            one for one in statements if one.sql.startswith(("SELECT", "DELETE", "UPDATE", "WITH"))
        ]
        assert len(polls) >= 10
        if store.engine.dialect.name == "sqlite":
            for one in polls:
                await _uses_indexes(store.engine, one)
        else:
            for one in polls:
                pages = await _pages(store.engine, one)
                assert pages < 200, f"{pages} pages for {one.sql}"
    finally:
        await store.close()


@pytest.mark.requirement("R35")
@pytest.mark.slow
async def test_plans_that_are_kept_stay_right_when_tables_grow(postgres_url: str) -> None:
    """Made for empty tables, they serve a batch among 10^5 rows without walking through any."""
    store, other = SqlStore(postgres_url, clock=VirtualClock()), create_async_engine(postgres_url)
    try:
        await store.prepare(create=True)
        async with other.begin() as connection:
            for table in metadata.tables:  # nothing may make PostgreSQL plan anew
                switch = f"ALTER TABLE {table} SET (autovacuum_enabled = false)"
                await connection.execute(text(switch))
        await one_batch(store, 4)
        await _fill(other, HISTORY, busy=True)
        await other.dispose()
        before = await _settled_counters(other, HISTORY)
        await one_batch(store, 4, base=100)
        await store.close()
        after = await _settled_counters(other, HISTORY + 4)
        assert after.read - before.read < 2_000
    finally:
        await store.close()
        await other.dispose()


@pytest.mark.requirement("R35")
async def test_forgetting_costs_the_same_whatever_the_statistics(postgres_url: str) -> None:
    """PostgreSQL mostly looks while nothing is pending: then it expects one row ever after."""
    store = SqlStore(postgres_url, clock=VirtualClock())
    try:
        await store.prepare(create=True)
        earlier = await store.append([outbox(f"a{n}", f"lane{n}") for n in range(600)])
        await store.published([row.seq for row in earlier])
        await _analyze(store.engine)
        rows = await store.append([outbox(f"b{n}", f"lane{n}") for n in range(600)])
        with logged(store) as statements:
            await store.published([0])
        [forget] = [one for one in statements if one.sql.startswith("DELETE")]
        numbers = ",".join(str(row.seq) for row in rows[:500])
        page = replace(forget, parameters=(numbers, *forget.parameters[1:]))
        pages = await _pages(store.engine, page)
        assert pages < 10 * 500, f"{pages} pages for {page.sql}"
    finally:
        await store.close()


@pytest.mark.requirement("R35")
async def test_an_update_costs_the_same_whatever_the_statistics(postgres_url: str) -> None:
    store = SqlStore(postgres_url, clock=VirtualClock())
    try:
        await store.prepare(create=True)
        async with store.transaction() as transaction:
            await transaction.write(Plan(now=1, parked=[parked(f"a{n}") for n in range(600)]))
        async with store.transaction() as transaction:
            gone = [("Order", f"a{n}") for n in range(600)]
            await transaction.write(Plan(now=1, unparked=gone))
        await _analyze(store.engine)
        async with store.transaction() as transaction:
            await transaction.write(Plan(now=1, parked=[parked(f"b{n}") for n in range(600)]))
        rows = [(b"Order", f"b{n}".encode(), 5) for n in range(500)]
        key = ("consumer", "message_id")
        async with OpenTransaction(store._database, "test") as opened:
            with logged(store) as statements:
                written = await opened.run(
                    "test",
                    lambda on: on.dialect.update(on, parked_table, key, ("due_at",), rows),
                )
        assert written == 500
        pages = await _pages(store.engine, statements[0])
        assert pages < 20 * 500, f"{pages} pages for {statements[0].sql}"
    finally:
        await store.close()


async def _settled_counters(engine: AsyncEngine, least: int) -> Any:
    """The rows and index entries read so far, once PostgreSQL knows of `least` rows of the inbox."""
    statement = text(
        "SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables) "
        "+ (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes) AS read, "
        "(SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'sagacity_inbox') AS written"
    )
    found: list[Any] = []

    async def told() -> bool:
        async with engine.connect() as connection:
            found.append((await connection.execute(statement)).one())
        await engine.dispose()
        return bool(found[-1].written >= least)

    await async_eventually(told, f"{least} rows in the statistics of the inbox")
    return found[-1]


def _something_of_everything(now: int) -> Plan:
    return Plan(
        now=now,
        saga_inserts=[instance()],
        inbox=[inbox()],
        outbox=[outbox("c1", "lane"), outbox("c2")],
        timeouts=[timeout()],
        parked=[parked("m2"), work("m3", "lane", 1)],
    )


async def _poll(store: SqlStore) -> None:
    """Everything a worker repeats, whether there is something to do or not."""
    now = store.clock.now()
    rows = await store.pending(now, 300)
    await store.due(["Order"], 300)
    await store.claim({"pay": 10}, LEASE, GAP)
    await store.next_task_at(["pay"])
    async with store.transaction() as transaction:
        await transaction.load({"Order": ["o1", "o2"]})
        await transaction.known([("Order", "m1")], [("uid-of-o1", "late", 1)], [("Order", "m2")])
        await transaction.write(
            Plan(now=now, outbox=[outbox("c3", "lane")]), [row.seq for row in rows]
        )


async def _fill(engine: AsyncEngine, many: int, *, busy: bool = False) -> None:
    """A long history: everything published, everything handled; if `busy`, much is to be done, too."""
    generate = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :many) "
        if engine.dialect.name == "sqlite"
        else "WITH n(i) AS (SELECT generate_series(1, :many)) "
    )
    blob = "CAST('h' || i AS BLOB)" if engine.dialect.name == "sqlite" else "('h' || i)::bytea"
    empty = "x''" if engine.dialect.name == "sqlite" else "''::bytea"
    tables = {
        "sagacity_outbox (message_id, message_type, destination, lane, headers, body, created_at)": (
            f"{blob}, 'T', 'orders', {blob}, {blob}, {blob}, i"
        ),
        "sagacity_inbox (consumer, message_id, outcome, at)": f"{blob}, {blob}, 'handled', i",
        "sagacity_saga (saga_type, saga_key, uid, version, status, state, schema_version, data, "
        "ledger, started_at, updated_at)": (
            f"'Order', {blob}, {blob}, 1, 'completed', 's', 1, {blob}, {blob}, i, i"
        ),
        "sagacity_lane (lane, next_sequence, token, lease_until, at)": f"{blob}, 1, {empty}, 0, i",
        "sagacity_tombstone (command_id, consumer, at)": f"{blob}, {blob}, i",
        "sagacity_transition (uid, version, saga_type, saga_key, at, message_id, message_type, "
        "handler, state_from, state_to, status, correlation_id, effects, entry)": (
            f"{blob}, 1, 'Order', {blob}, i, {blob}, 'T', 'h', 'a', 'b', 'completed', {blob}, "
            f"{blob}, {blob}"
        ),
    }
    to_do = {
        "sagacity_outbox_pending (seq, lane, created_at)": f"1000000 + i, {blob}, i",
        "sagacity_timeout (uid, name, generation, due_at, saga_type, saga_key)": (
            f"{blob}, {blob}, 1, 4000000000000000, 'Order', {blob}"
        ),
        "sagacity_parked (consumer, message_id, saga_type, saga_key, lane, sequence, due_at, "
        "attempts, parked_at, reason, error, entry, undoes)": (
            f"{blob}, {blob}, 'Order', {blob}, {blob}, 0, 4000000000000000, 0, i, 'retry', {blob}, "
            f"{blob}, {blob}"
        ),
        "sagacity_correlation (saga_type, name, value, saga_key, is_unique)": (
            f"'Order', 'user', {blob}, {blob}, TRUE"
        ),
        "sagacity_correlation_past (saga_type, name, value, at)": f"'Order', 'user', {blob}, i",
    }
    async with engine.begin() as connection:
        for table, values in (tables | (to_do if busy else {})).items():
            await connection.execute(
                text(f"INSERT INTO {table} {generate} SELECT {values} FROM n"), {"many": many}
            )


async def _analyze(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("ANALYZE"))


async def _pages(engine: AsyncEngine, statement: Statement) -> int:
    """How many pages PostgreSQL touches for a statement."""
    async with engine.connect() as connection:
        result = await connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.sql}", statement.parameters
        )
        told: Any = result.scalar_one()
        await connection.rollback()
    plan = (json.loads(told) if isinstance(told, str) else told)[0]["Plan"]
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


async def _uses_indexes(engine: AsyncEngine, statement: Statement) -> None:
    """Fails if SQLite would walk through one of the tables that grow."""
    parameters = statement.parameters[0] if statement.many else statement.parameters
    async with engine.connect() as connection:
        result = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement.sql}", parameters)
        steps = [str(row["detail"]) for row in result.mappings()]
        await connection.rollback()
    for step in steps:
        for table in GROWING:
            assert f"SCAN {table} " not in f"{step} ", f"{steps} for {statement.sql}"
        # The instances of a type are as many as there are: a search by the type alone is a scan.
        assert "(saga_type=?)" not in step, f"{steps} for {statement.sql}"
