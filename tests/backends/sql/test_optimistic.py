"""What an optimistic batch may not lose or double, and the connections that are kept for batches."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import anyio
import pytest
from sqlalchemy import NullPool, StaticPool, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.links import KEPT_MAX, Direct
from sagacity.core.errors import Conflict
from sagacity.core.plan import Plan
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import inbox, instance, outbox, parked, timeout
from tests.servers.proxy import TcpProxy
from tests.waiting import async_eventually

DRIVERS = ["asyncpg", "psycopg"]


@pytest.fixture(params=DRIVERS)
def server_url(request: pytest.FixtureRequest) -> str:
    name = {"asyncpg": "postgres_url", "psycopg": "psycopg_url"}[request.param]
    return str(request.getfixturevalue(name))


async def step(store: SqlStore, message_id: str = "m1") -> None:
    """One small batch: it reads, and writes a message."""
    async with store.transaction(optimistic=True) as transaction:
        await transaction.read({"Order": ["o1"]}, [("Order", message_id)])
        await transaction.write(Plan(now=transaction.now, inbox=[inbox(message_id)]))


async def seen(store: SqlStore, *message_ids: str) -> set[str]:
    async with store.transaction() as transaction:
        known = await transaction.known([("Order", one) for one in message_ids])
    return {message_id for _, message_id in known.seen}


def kept(store: SqlStore) -> int:
    """How many connections wait for the next batch."""
    return len(direct(store).kept)


def direct(store: SqlStore) -> Direct:
    found = store._database.direct
    assert found is not None
    return found


async def sessions(store: SqlStore) -> int:
    """How many others the server has in this database."""
    async with store.engine.connect() as connection:
        found = await connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    return int(found or 0)


# --- kept connections --------------------------------------------------------------------------------


def test_a_pool_that_keeps_nothing_is_obeyed(server_url: str) -> None:
    """Each run of an event loop has connections of its own: a kept one would belong to the last."""
    store = SqlStore(create_async_engine(server_url, poolclass=NullPool))

    async def first() -> None:
        await store.prepare(create=True)
        await step(store, "m1")

    asyncio.run(first())
    asyncio.run(step(store, "m2"))
    assert asyncio.run(seen(store, "m1", "m2")) == {"m1", "m2"}


@pytest.mark.asyncio
async def test_the_only_connection_of_a_pool_stays_there() -> None:
    """A database in memory is its connection."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    store = SqlStore(engine)
    try:
        await store.prepare(create=True)
        await step(store)
        assert await seen(store, "m1") == {"m1"}
        assert await store.counts()
    finally:
        await store.close()
        await engine.dispose()


def test_an_engine_that_is_disposed_of_lets_go_of_all(store_url: str) -> None:
    """As SQLAlchemy asks for before the engine is used in another event loop."""
    engine = create_async_engine(store_url)
    store = SqlStore(engine)

    async def run(message_id: str) -> None:
        await store.prepare(create=True)
        await step(store, message_id)
        await engine.dispose()
        assert kept(store) == 0

    asyncio.run(run("m1"))
    asyncio.run(run("m2"))


@pytest.mark.asyncio
async def test_disposing_and_closing_end_the_sessions_of_the_server(server_url: str) -> None:
    operator = SqlStore(server_url)
    engine = create_async_engine(server_url)
    store = SqlStore(engine)

    async def alone() -> bool:
        return await sessions(operator) == 0

    try:
        await store.prepare(create=True)
        for end in (engine.dispose, store.close):
            await step(store, end.__qualname__)
            assert kept(store) == 1
            await end()
            assert kept(store) == 0
            await engine.dispose()
            await async_eventually(alone, "all connections are closed")
    finally:
        await store.close()
        await engine.dispose()
        await operator.close()


@pytest.mark.asyncio
async def test_closing_while_a_batch_runs_leaks_no_connection(store_url: str) -> None:
    store = SqlStore(store_url)
    await store.prepare(create=True)
    async with store.transaction(optimistic=True) as transaction:
        await transaction.read({"Order": ["o1"]}, [])
        await store.close()
        await transaction.write(Plan(now=transaction.now, inbox=[inbox()]))
    assert kept(store) == 0
    await step(store, "m2")  # a closed store may be used again
    await store.close()
    assert kept(store) == 0


@pytest.mark.asyncio
async def test_no_more_are_kept_than_said(server_url: str) -> None:
    store, operator = SqlStore(server_url), SqlStore(server_url)
    try:
        await store.prepare(create=True)
        gate = anyio.Event()
        inside = 0

        async def one(number: int) -> None:
            nonlocal inside
            async with store.transaction(optimistic=True) as transaction:
                await transaction.read({"Order": [f"o{number}"]}, [])
                inside += 1
                await gate.wait()

        async with anyio.create_task_group() as tasks:
            for number in range(KEPT_MAX + 3):
                tasks.start_soon(one, number)

            async def all_inside() -> bool:
                return inside == KEPT_MAX + 3

            await async_eventually(all_inside, "all are inside")
            gate.set()
        assert kept(store) == KEPT_MAX
        assert len({id(one.dbapi) for one in direct(store).kept}) == KEPT_MAX
        await store.engine.dispose()

        async def alone() -> bool:
            return await sessions(operator) == kept(store)

        await async_eventually(alone, "the others are closed")
    finally:
        await store.close()
        await operator.close()


@pytest.mark.asyncio
async def test_a_kept_connection_is_renewed_as_often_as_the_pools(postgres_url: str) -> None:
    """A firewall, say, forgets connections that are older than that."""
    engine = create_async_engine(postgres_url, pool_recycle=0)
    store = SqlStore(engine)

    async def backend() -> int:
        async with store.transaction(optimistic=True) as transaction:
            await transaction.read({"Order": ["o1"]}, [])
            link: Any = transaction._opened._link
            return int(link._backend())

    try:
        await store.prepare(create=True)
        assert await backend() != await backend()
    finally:
        await store.close()
        await engine.dispose()


@pytest.mark.asyncio
async def test_a_pool_of_one_is_enough(server_url: str) -> None:
    engine = create_async_engine(server_url, pool_size=1, max_overflow=0, pool_timeout=5)
    store = SqlStore(engine)
    try:
        await store.prepare(create=True)
        async with store.transaction(optimistic=True) as transaction:
            await transaction.read({"Order": ["o1"]}, [])
            await store.due(["Order"], 1)  # by the one of the pool
            await transaction.write(Plan(now=transaction.now, inbox=[inbox()]))
        assert await seen(store, "m1") == {"m1"}
    finally:
        await store.close()
        await engine.dispose()


@pytest.mark.asyncio
async def test_an_engine_that_commits_by_itself_goes_on_to(psycopg_url: str) -> None:
    """What batches and look-ups change about a connection of the pool is put back."""
    engine = create_async_engine(
        psycopg_url, isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=0
    )
    store = SqlStore(engine)
    try:
        await store.prepare(create=True)
        await store.due(["Order"], 1)
        async with engine.connect() as connection:
            await connection.execute(text("CREATE TABLE mine (id INTEGER)"))
        async with engine.connect() as connection:
            assert (await connection.scalar(text("SELECT count(*) FROM mine"))) == 0
    finally:
        await store.close()
        await engine.dispose()


FORKED = """
import asyncio, os, sys
from sqlalchemy.ext.asyncio import create_async_engine
from sagacity.backends.sql import SqlStore
from sagacity.core.plan import InboxRow, Outcome, Plan

engine = create_async_engine(sys.argv[1])
store = SqlStore(engine)

async def step(message_id):
    async with store.transaction(optimistic=True) as transaction:
        await transaction.read({"Order": ["o1"]}, [])
        row = InboxRow("Order", message_id, Outcome.HANDLED)
        await transaction.write(Plan(now=transaction.now, inbox=[row]))

async def main():
    await store.prepare(create=True)
    await step("parent")

async def end():
    await store.close()
    await engine.dispose()

asyncio.run(main())
child = os.fork()
if child == 0:
    engine.sync_engine.dispose(close=False)
    asyncio.run(step("child"))
    asyncio.run(end())
    sys.exit()
_, status = os.waitpid(child, 0)
assert status == 0, status
"""


def test_a_forked_child_has_connections_of_its_own(server_url: str) -> None:
    """As SQLAlchemy says: the child disposes of the engine without closing what is the parent's."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, server_url],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr

    async def found() -> set[str]:
        store = SqlStore(server_url)
        try:
            return await seen(store, "parent", "child")
        finally:
            await store.close()

    assert asyncio.run(found()) == {"parent", "child"}


# --- cut off -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_is_cancelled_while_it_begins_leaves_no_transaction_open(
    server_url: str,
) -> None:
    """Else the next batch would write into it, and nobody would ever commit that."""
    url = make_url(server_url)
    assert url.port is not None
    async with TcpProxy(url.port) as proxy:
        slow = url.set(host="127.0.0.1", port=proxy.port)
        if url.get_driver_name() == "psycopg":
            slow = slow.update_query_dict({"sslmode": "disable"})
        store = SqlStore(slow, clock=VirtualClock())
        honest = SqlStore(server_url, clock=VirtualClock())
        try:
            await store.prepare(create=True)
            await step(store, "before")
            begins = asyncio.Event()

            async def cut_off() -> None:
                async with store.transaction(optimistic=True) as transaction:
                    proxy.freeze()
                    begins.set()
                    await transaction.read({"Order": ["o1"]}, [], wait=True)

            task = asyncio.create_task(cut_off())
            await begins.wait()
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            proxy.thaw()
            with pytest.raises(asyncio.CancelledError):
                await task
            await step(store, "after")
            assert await seen(honest, "before", "after") == {"before", "after"}
        finally:
            await store.close()
            await honest.close()


@pytest.mark.asyncio
async def test_a_connection_is_good_after_its_statement_was_cancelled(server_url: str) -> None:
    store, other = SqlStore(server_url), SqlStore(server_url)
    try:
        await store.prepare(create=True)
        await step(store, "before")
        async with other.transaction() as holder:
            await holder.write(Plan(now=1, inbox=[inbox()]))
            task = asyncio.create_task(step(store))
            await async_eventually(lambda: waiting(other, 1), "it waits for the inbox row")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await step(store, "after")
        assert await seen(other, "m1", "before", "after") == {"m1", "before", "after"}
    finally:
        await store.close()
        await other.close()


async def waiting(store: SqlStore, many: int) -> bool:
    """True once so many sessions of this database wait for a lock."""
    async with store.engine.connect() as connection:
        found = await connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )
    return bool(found == many)


# --- the order of locks ------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("optimistic", [True, False], ids=["optimistic", "locked"])
async def test_batches_that_wake_the_same_rows_never_wait_in_a_circle(
    server_url: str, optimistic: bool
) -> None:
    """One plan is one statement, the other one several; both start an instance and wake what waits
    for it."""
    first, second, third = (SqlStore(server_url, clock=VirtualClock()) for _ in range(3))
    waits = parked("p1", lane="ref=o1", due_at=10**15, reason="missing")
    starts: dict[str, Any] = {"saga_inserts": [instance()], "woken": [("Order", "ref=o1")]}
    late: list[BaseException] = []
    try:
        await first.prepare(create=True)
        async with first.transaction() as transaction:
            plan = Plan(now=1, parked=[waits], timeouts=[timeout(key="other")])
            await transaction.write(plan)

        async def several() -> None:
            async with second.transaction() as transaction:
                gone = [("uid-of-other", "late")]
                await transaction.write(Plan(now=2, timeouts_cancelled=gone, **starts))

        async def at_once() -> None:
            try:
                async with first.transaction(optimistic=optimistic) as transaction:
                    await transaction.write(
                        Plan(now=3, inbox=[inbox()], outbox=[outbox("c1")], **starts)
                    )
            except Conflict as error:
                late.append(error)

        async with anyio.create_task_group() as tasks, third.engine.connect() as holder:
            await holder.execute(text("SELECT 1 FROM sagacity_timeout FOR UPDATE"))
            tasks.start_soon(several)
            await async_eventually(lambda: waiting(third, 1), "one is in the middle")
            tasks.start_soon(at_once)
            await async_eventually(lambda: waiting(third, 2), "the other one waits for it")
            await holder.rollback()
        assert len(late) == 1
        assert "deadlock" not in str(late[0])
        assert await third.counts() is not None
        assert [row.due_at for row in (await third.due(["Order"], 9)).parked] in ([], [2])
    finally:
        for store in (first, second, third):
            await store.close()
