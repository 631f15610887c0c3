"""Tests that roll everything back see what happens after a commit all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sqlalchemy import select

from sagacity.core.errors import ConfigurationError
from sagacity.core.messages import Event
from sagacity.recording import Mode, Subscriber
from sagacity.service import Context, Service, subscribes
from sagacity.testing.rehearsal import Rehearsal
from tests.backends.sql.orders import Database, Noted, Order, Placed, Seat, fresh_database

pytestmark = [pytest.mark.asyncio, pytest.mark.requirement("R56")]


@pytest_asyncio.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    async with fresh_database(store_url) as database:
        yield database


async def untouched(database: Database) -> bool:
    return (
        await database.published() == []
        and await database.refs() == []
        and await database.count(Seat) == 0
        and await database.failures() == []
    )


async def test_post_commit_behaviour_is_seen_and_everything_is_rolled_back(
    database: Database,
) -> None:
    seen: list[str] = []

    @subscribes(Placed)
    async def take_seat(event: Placed, context: Context) -> None:
        seen.append("durable")
        context.session.add(Seat(train=event.ref, number=1))
        order = (await context.session.scalars(select(Order))).one()
        order.note("seated")

    @subscribes(Placed, mode="after_commit")
    def after(event: Placed) -> None:
        seen.append("after commit")

    @subscribes(Placed, mode="in_transaction")
    async def inside(event: Placed) -> None:
        seen.append("inside")

    service = Service("shop", handlers=[take_seat, after, inside])
    async with Rehearsal(database.engine, service=service) as rehearsal:
        async with rehearsal.session() as session, session.begin():
            session.add(Order.place("o1"))
            assert seen == [], "nothing before the commit"
        assert seen == ["inside", "after commit", "durable"]
        assert rehearsal.events == [Placed("o1"), Noted("seated")]
        placed, noted = rehearsal.envelopes
        assert noted.causation_id == placed.id
        assert placed.source == noted.source == "shop"
        async with rehearsal.session() as session:
            assert (await session.scalars(select(Seat.train))).all() == ["o1"]
    assert await untouched(database)


async def test_a_rolled_back_session_delivers_nothing(database: Database) -> None:
    async with Rehearsal(database.engine) as rehearsal:
        with pytest.raises(RuntimeError):
            async with rehearsal.session() as session, session.begin():
                session.add(Order.place("o1"))
                await session.write_events()
                raise RuntimeError
        async with rehearsal.session() as session, session.begin():
            savepoint = await session.begin_nested()
            session.add(Order.place("o2"))
            await savepoint.rollback()
            session.add(Order.place("o3"))
        assert rehearsal.events == [Placed("o3")]
        async with rehearsal.session() as session:
            assert (await session.scalars(select(Order.ref))).all() == ["o3"]
    assert await untouched(database)


async def test_a_failing_subscriber_loses_its_own_work_and_fails_the_test(
    database: Database,
) -> None:
    async def fail(event: Event, context: Context) -> None:
        context.session.add(Seat(train="half", number=1))
        await context.session.flush()
        raise LookupError("no train")

    reached: list[Event] = []
    subscribers = [
        Subscriber(event=Placed, function=fail, name="fail"),
        Subscriber(event=Placed, function=reached.append, name="reached"),
    ]
    with pytest.raises(AssertionError) as told:
        async with Rehearsal(database.engine, subscribers=subscribers) as rehearsal:
            async with rehearsal.session() as session, session.begin():
                session.add(Order.place("o1"))
            assert reached == [Placed("o1")]
            async with rehearsal.session() as session:
                assert (await session.scalars(select(Seat))).all() == []
                assert (await session.scalars(select(Order.ref))).all() == ["o1"]
    assert "fail on orders.Placed" in str(told.value)
    assert "LookupError: no train" in str(told.value)
    assert await untouched(database)


async def test_failures_may_be_what_is_tested(database: Database) -> None:
    def fail(event: Event) -> None:
        raise LookupError("no mail")

    subscribers = [
        Subscriber(event=Placed, function=fail, name="durable"),
        Subscriber(event=Placed, function=fail, name="after", mode=Mode.AFTER_COMMIT),
    ]
    async with Rehearsal(
        database.engine, subscribers=subscribers, failures_allowed=True
    ) as rehearsal:
        async with rehearsal.session() as session, session.begin():
            session.add(Order.place("o1"))
        assert sorted(one.subscriber for one in rehearsal.failures) == ["after", "durable"]
        assert all("LookupError: no mail" in one.error for one in rehearsal.failures)
    assert await untouched(database)


async def test_a_rehearsal_has_to_be_begun(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="not begun"):
        Rehearsal(database.engine).session()
