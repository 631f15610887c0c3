"""A participant's rows, its reply and the end of its task are one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from sqlalchemy import delete, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.database import READ_ONLY
from sagacity.backends.sql.session import SagaSession
from sagacity.backends.sql.tables import parked as parked_table
from sagacity.core.errors import Conflict, Unavailable
from sagacity.core.messages import Event
from sagacity.core.plan import ParkedRow, Plan
from sagacity.ports import Finish, Task
from sagacity.recording import RecordsEvents
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import SECOND, message_ids, outbox
from sagacity.testing.conformance.tasks import GAP, LEASE, work

pytestmark = pytest.mark.asyncio


class Paid(Event, topic="money"):
    ref: str


class Model(DeclarativeBase):
    pass


class Payment(RecordsEvents, Model):
    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[str] = mapped_column(unique=True)


class Desk:
    """A store with the participant's own table, and a second one that looks on."""

    def __init__(self, store: SqlStore, other: SqlStore, clock: VirtualClock) -> None:
        self.store, self.other, self.clock = store, other, clock

    async def task(self, *rows: ParkedRow) -> Task:
        """Parks a command and claims it."""
        async with self.store.transaction() as transaction:
            await transaction.write(Plan(now=transaction.now, parked=list(rows) or [work("m1")]))
        [task] = await self.store.claim({"pay": 1}, LEASE, GAP)
        return task

    async def payments(self) -> list[str]:
        """What another connection sees."""
        async with self.other.engine.connect() as connection:
            await connection.execution_options(**{READ_ONLY: True})
            return list((await connection.execute(select(Payment.ref))).scalars())

    async def parked(self) -> int:
        return (await self.other.counts())["parked"]


@asynccontextmanager
async def desk(url: str, *, recording: bool = False) -> AsyncIterator[Desk]:
    clock = VirtualClock()
    store = (
        SqlStore(url, clock=clock, session_factory=SagaSession)
        if recording
        else SqlStore(url, clock=clock)
    )
    other = SqlStore(url, clock=clock)
    try:
        await store.prepare(create=True)
        async with store.engine.begin() as connection:
            await connection.run_sync(Model.metadata.create_all)
        yield Desk(store, other, clock)
    finally:
        await store.close()
        await other.close()


async def test_rows_reply_and_task_commit_together(store_url: str) -> None:
    async with desk(store_url) as d:
        task = await d.task()
        async with d.store.work(task) as unit:
            payment = Payment(ref="p1")
            unit.session.add(payment)
            await unit.session.flush()
            assert await d.payments() == []
            rows = await unit.finish(Finish(task=task, outbox=(outbox("paid", "lane"),)))
            assert payment.ref == "p1"  # readable after the commit
        assert message_ids(rows) == ["paid"]
        assert await d.payments() == ["p1"]
        assert await d.parked() == 0
        assert message_ids(await d.other.pending(d.clock.now(), 9)) == ["paid"]


async def test_rows_that_were_not_flushed_are_written_too(store_url: str) -> None:
    async with desk(store_url) as d:
        task = await d.task()
        async with d.store.work(task) as unit:
            unit.session.add(Payment(ref="p1"))
            await unit.finish(Finish(task=task))
        assert await d.payments() == ["p1"]


async def test_leaving_without_an_end_rolls_back(store_url: str) -> None:
    async with desk(store_url) as d:
        task = await d.task()
        with pytest.raises(ValueError, match="the handler failed"):
            async with d.store.work(task) as unit:
                unit.session.add(Payment(ref="p1"))
                await unit.session.flush()
                raise ValueError("the handler failed")
        assert await d.payments() == []
        assert await d.parked() == 1
        rows = await d.store.finish([Finish(task=task, retry_at=0, error="failed")])
        assert rows == []


async def test_a_lost_lease_takes_the_rows_along(store_url: str) -> None:
    async with desk(store_url) as d:
        task = await d.task()
        d.clock.advance(LEASE / SECOND)
        [_] = await d.other.claim({"pay": 1}, LEASE, GAP)
        async with d.store.work(task) as unit:
            unit.session.add(Payment(ref="p1"))
            with pytest.raises(Conflict, match="another worker's"):
                await unit.finish(Finish(task=task, outbox=(outbox("paid"),)))
        assert await d.payments() == []
        assert await d.store.pending(d.clock.now(), 9) == []


async def test_a_wrong_row_of_the_user_is_told_as_it_is(store_url: str) -> None:
    """It is the handler's failure, not a lost race of ours: trying again at once would not help."""
    async with desk(store_url) as d:
        first, second = work("m1"), work("m2")
        task = await d.task(first)
        async with d.store.work(task) as unit:
            unit.session.add(Payment(ref="same"))
            await unit.finish(Finish(task=task))
        task = await d.task(second)
        async with d.store.work(task) as unit:
            unit.session.add(Payment(ref="same"))
            with pytest.raises(IntegrityError):
                await unit.finish(Finish(task=task))
        assert await d.parked() == 1


async def test_nothing_is_begun_before_the_first_use(store_url: str) -> None:
    async with desk(store_url) as d:
        task = await d.task()
        async with d.store.work(task) as unit:
            session = unit.session
            assert not session.in_transaction()
            assert d.store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            with anyio.fail_after(5):  # on SQLite an open transaction would be in the way
                await d.other.append([outbox("meanwhile")])
            assert await session.scalar(text("SELECT 1")) == 1
            await unit.finish(Finish(task=task))


async def test_many_tasks_at_once(store_url: str) -> None:
    async with desk(store_url) as d:
        numbers = range(12)
        async with d.store.transaction() as transaction:
            rows = [work(f"m{n}") for n in numbers]
            await transaction.write(Plan(now=transaction.now, parked=rows))
        tasks = await d.store.claim({"pay": 100}, LEASE, GAP)

        async def handle(task: Task) -> None:
            async with d.store.work(task) as unit:
                unit.session.add(Payment(ref=task.row.message_id))
                await unit.session.flush()
                await anyio.lowlevel.checkpoint()
                await unit.finish(Finish(task=task))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for task in tasks:
                    group.start_soon(handle, task)
        assert sorted(await d.payments()) == sorted(f"m{n}" for n in numbers)
        assert await d.parked() == 0


@pytest.mark.requirement("R17", "R29")
async def test_recorded_events_leave_with_the_end_of_the_task(store_url: str) -> None:
    async with desk(store_url, recording=True) as d:
        task = await d.task()
        async with d.store.work(task) as unit:
            payment = Payment(ref="p1")
            payment.record(Paid("p1"))
            unit.session.add(payment)
            rows = await unit.finish(Finish(task=task, outbox=(outbox("reply"),)))
        assert [row.envelope.type.rpartition(".")[2] for row in rows] == ["Paid", "Happened"]
        assert len(await d.other.pending(d.clock.now() + 10**15, 9)) == 2


async def test_events_of_a_lost_task_never_leave(store_url: str) -> None:
    async with desk(store_url, recording=True) as d:
        task = await d.task()
        async with d.other.engine.begin() as connection:
            await connection.execute(delete(parked_table))
        async with d.store.work(task) as unit:
            payment = Payment(ref="p1")
            payment.record(Paid("p1"))
            unit.session.add(payment)
            with pytest.raises(Conflict):
                await unit.finish(Finish(task=task))
        assert await d.payments() == []
        assert await d.other.pending(d.clock.now() + 10**15, 9) == []


async def test_a_session_may_wait_for_the_outside_world(postgres_url: str) -> None:
    async with desk(postgres_url) as d:
        task = await d.task()
        async with d.store.work(task) as unit:
            shown = text("SHOW idle_in_transaction_session_timeout")
            assert await unit.session.scalar(shown) == "2min"
            await unit.finish(Finish(task=task))
        async with d.store.engine.connect() as connection:  # only for that transaction
            assert (await connection.execute(shown)).scalar_one() == "15s"


async def test_a_connection_that_dies_under_the_session_is_unavailable(postgres_url: str) -> None:
    async with desk(postgres_url) as d:
        task = await d.task()
        async with d.store.work(task) as unit:
            unit.session.add(Payment(ref="p1"))
            await unit.session.flush()
            async with d.other.engine.connect() as connection:
                await connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
            with pytest.raises(Unavailable):
                await unit.finish(Finish(task=task))
        assert await d.parked() == 1
        async with d.store.work(task) as unit:
            await unit.finish(Finish(task=task))
        assert await d.parked() == 0
