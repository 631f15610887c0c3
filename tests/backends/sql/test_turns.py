"""Writers of one process take turns at an SQLite file."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.database import Database
from sagacity.backends.sql.turns import Turn, Turns
from sagacity.backends.sql.work import SqlWork, recording_session
from sagacity.core.delivery import Envelope
from sagacity.core.errors import Unavailable
from sagacity.core.plan import ParkedRow
from sagacity.ports import Task

pytestmark = pytest.mark.asyncio


def task() -> Task:
    envelope = Envelope(id="m", type="t", topic="t")
    row = ParkedRow(
        consumer="c",
        message_id="m",
        due_at=0,
        attempts=0,
        parked_at=0,
        reason="work",
        envelope=envelope,
    )
    return Task(row=row, token="token", lease_until=0, tombstone=False)


async def test_first_come_first_served() -> None:
    turns = Turns(5)
    order: list[int] = []

    async def write(number: int) -> None:
        turn = Turn(turns)
        await turn.take()
        order.append(number)
        await anyio.lowlevel.checkpoint()
        turn.give_up()
        turn.give_up()  # harmless

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(write, number)
            await anyio.lowlevel.checkpoint()
    assert order == list(range(5))


async def test_a_turn_that_does_not_come_is_told() -> None:
    turns = Turns(0.01)
    await Turn(turns).take()
    with pytest.raises(Unavailable, match="keep transactions short"):
        await Turn(turns).take()


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "error"])
async def test_a_transaction_beside_a_tasks_session_ends_its_own_turn(
    sqlite_url: str, end: str
) -> None:
    """A handler that has written in a short transaction of its own, and now waits for some remote
    system, holds up no other writer of its process."""
    store = SqlStore(sqlite_url)
    await store.prepare(create=True)
    database = store._database
    assert database.turns is not None
    database.turns.patience_s = 0.5
    async with SqlWork(database, task(), recording_session) as work:
        engine = work.session.bind
        assert isinstance(engine, AsyncEngine)
        for _ in range(2):
            await _write(engine, end)
            await _another_writer(database)  # the task is still at work
        await work.session.execute(text("CREATE TABLE mine (id INTEGER)"))
        with pytest.raises(Unavailable):
            await _another_writer(database)  # now it would have to wait for the session
    await _another_writer(database)
    await store.close()


async def test_one_connection_with_several_transactions_keeps_its_turn_until_it_is_closed(
    sqlite_url: str,
) -> None:
    store = SqlStore(sqlite_url)
    await store.prepare(create=True)
    async with SqlWork(store._database, task(), recording_session) as work:
        engine = work.session.bind
        assert isinstance(engine, AsyncEngine)
        async with engine.connect() as connection:
            for name in ("one", "two"):
                async with connection.begin():
                    await connection.execute(text(f"CREATE TABLE {name} (id INTEGER)"))
        await _another_writer(store._database)
    await store.close()


async def _write(engine: AsyncEngine, end: str) -> None:
    session = AsyncSession(engine)
    try:
        await session.execute(text("CREATE TABLE IF NOT EXISTS other (id INTEGER)"))
        if end == "commit":
            await session.commit()
        elif end == "rollback":
            await session.rollback()
        elif end == "error":
            with pytest.raises(Exception, match="nonsense"):
                await session.execute(text("nonsense"))
    finally:
        await session.close()


async def _another_writer(database: Database) -> None:
    await database.write("another", lambda c: c.execute(text("SELECT 1")))
