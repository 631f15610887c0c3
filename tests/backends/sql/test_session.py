"""Recorded events become outbox rows in the transaction that changes the entities, or vanish."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Connection, create_engine, event, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.orm.exc import StaleDataError

from sagacity.backends.sql.append import append
from sagacity.backends.sql.database import open_engine
from sagacity.backends.sql.session import RecordingSession, SagaSession, session_factory
from sagacity.backends.sql.tables import metadata, outbox
from sagacity.core.delivery import Envelope
from sagacity.core.errors import ConfigurationError, NotRecordable
from sagacity.recording import Origin, RecordsEvents, originating
from tests.backends.sql.orders import (
    Database,
    Line,
    LineAdded,
    Model,
    Noted,
    Order,
    Placed,
    Removed,
    Seat,
    fresh_database,
)

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    async with fresh_database(store_url) as database:
        yield database


@pytest.fixture
def sessions(database: Database) -> async_sessionmaker[SagaSession]:
    return session_factory(database.engine, service="shop")


async def stored(sessions: async_sessionmaker[SagaSession], ref: str = "o1") -> int:
    """Stores an order that has recorded nothing."""
    async with sessions() as session, session.begin():
        order = Order(ref=ref, lines=[Line(product="tea")])
        session.add(order)
    return order.id


# --- no entity is missed -------------------------------------------------------------------------


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_events_of_a_new_entity_leave(
    sessions: async_sessionmaker[SagaSession], database: Database, moment: str
) -> None:
    async with sessions() as session, session.begin():
        order = Order(ref="o1")
        if moment == "before":
            order.note("early")
        session.add(order)
        if moment == "after":
            order.note("late")
    assert await database.published() == ["Noted"]
    assert order.pending_events == ()


@pytest.mark.requirement("R19")
async def test_events_of_new_entities_behind_a_relationship_leave(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        line = Line(product="tea")
        line.record(LineAdded("tea"))
        session.add(Order(ref="o1", lines=[line]))
    assert await database.published() == ["LineAdded"]


@pytest.mark.requirement("R19")
async def test_events_of_a_dirty_entity_leave(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        (await session.get_one(Order, key)).rename("o2")
    assert await database.published() == ["Renamed"]


@pytest.mark.requirement("R19")
async def test_events_of_a_clean_entity_leave(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        (await session.get_one(Order, key)).note("seen")
    assert await database.published() == ["Noted"]


@pytest.mark.requirement("R19")
async def test_events_of_an_entity_whose_collection_alone_changed_leave(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        order = await session.get_one(Order, key, options=[selectinload(Order.lines)])
        order.add_line("milk")
        await session.flush()  # afterwards nothing in the session says that the order changed
        assert order not in session.dirty
    assert await database.published() == ["LineAdded"]
    assert await database.count(Line) == 2


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("moment", ["before", "after", "flushed"])
async def test_events_of_a_deleted_entity_leave(
    sessions: async_sessionmaker[SagaSession], database: Database, moment: str
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        order = await session.get_one(Order, key, options=[selectinload(Order.lines)])
        if moment == "before":
            order.record(Removed("o1"))
        await session.delete(order)
        if moment == "flushed":
            await session.flush()
        if moment != "before":
            order.record(Removed("o1"))
    assert [(row.type, row.subject) for row in await database.envelopes()] == [
        ("orders.Removed", f"Order/{key}")
    ]
    assert await database.refs() == []


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("flush", [True, False])
async def test_events_of_an_entity_that_the_program_dropped_leave(
    sessions: async_sessionmaker[SagaSession], database: Database, flush: bool
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        order: Order | None = await session.get_one(Order, key)
        assert order is not None
        order.note("seen")
        order = None
        gc.collect()
        if flush:
            await session.flush()
            gc.collect()
    assert await database.published() == ["Noted"]


@pytest.mark.requirement("R19")
async def test_events_of_a_detached_entity_join_when_it_is_added(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session:
        order = await session.get_one(Order, key)
    order.note("far away")
    async with sessions() as session, session.begin():
        session.add(order)
        order.note("here")
    assert [row.body for row in await database.envelopes()] == [
        b'{"text":"far away"}',
        b'{"text":"here"}',
    ]


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("known", [True, False], ids=["detached", "new"])
async def test_events_of_merged_entities_join(
    sessions: async_sessionmaker[SagaSession], database: Database, known: bool
) -> None:
    key = 0
    if known:
        key = await stored(sessions)
        async with sessions() as session:
            given = await session.get_one(Order, key)
        given.rename("o2")
    else:
        given = Order.place("o2")
    async with sessions() as session, session.begin():
        merged = await session.merge(given)
        await session.flush()
        key = merged.id
    assert [row.subject for row in await database.envelopes()] == [f"Order/{key}"]
    assert given.pending_events == ()
    assert await database.refs() == ["o2"]


@pytest.mark.requirement("R19")
async def test_events_of_objects_merged_together_or_by_cascade_join(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session:
        order = await session.get_one(Order, key, options=[selectinload(Order.lines)])
    order.lines[0].record(LineAdded("tea"))
    async with sessions() as session, session.begin():
        await session.run_sync(lambda sync: sync.merge_all([order, Order.place("o2")]))
    assert await database.published() == ["LineAdded", "Placed"]
    assert (await database.envelopes())[0].subject.startswith("Line/")


@pytest.mark.requirement("R19")
async def test_an_entity_that_was_expunged_before_it_was_stored_says_nothing(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        order = Order.place("o1")
        session.add(order)
        session.expunge(order)
    assert await database.published() == []
    assert order.pending_events == (Placed("o1"),)


async def test_an_entity_that_moved_to_another_session_speaks_there(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as first, sessions() as second:
        order = Order.place("o1")
        first.add(order)
        first.expunge(order)
        second.add(order)
        await first.commit()
        assert await database.published() == []
        await second.commit()
    assert await database.published() == ["Placed"]


async def test_objects_that_are_not_mapped_are_collected(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    class Basket(RecordsEvents):
        id = "b7"

    basket = Basket()
    basket.record(Noted("before"))
    async with sessions() as session, session.begin():
        session.collect(basket)
        basket.record(Noted("after"))
        savepoint = await session.begin_nested()
        basket.record(Noted("inside"))
        await savepoint.rollback()
    assert [(row.subject, row.body) for row in await database.envelopes()] == [
        ("Basket/b7", b'{"text":"before"}'),
        ("Basket/b7", b'{"text":"after"}'),
    ]
    basket.record(Noted("not collected again"))
    async with sessions() as session:
        await session.commit()
    assert len(await database.envelopes()) == 2
    assert len(basket.pending_events) == 1


@pytest.mark.requirement("R18")
async def test_a_second_commit_repeats_nothing(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session:
        order = Order.place("o1")
        session.add(order)
        await session.commit()
        await session.commit()
        order.note("more")
        await session.commit()
        await session.commit()
    assert await database.published() == ["Placed", "Noted"]


# --- header --------------------------------------------------------------------------------------


@pytest.mark.requirement("R1", "R22")
async def test_the_header_is_complete_and_has_the_generated_key(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        cause = Envelope(
            id="c1", type="orders.Place", topic="orders", correlation_id="s1", actor="ann"
        )
        session.origin = Origin.following(cause)
        session.add(order := Order.place("o1"))
        seat = Seat(train="IC 5", number=12)
        seat.record(Noted("taken"))
        session.add(seat)
        assert vars(order).get("id") is None, "the database has not made the key yet"
    placed, noted = await database.envelopes()
    assert placed.subject == f"Order/{order.id}"
    assert noted.subject == "Seat/IC 5,12"
    for envelope in (placed, noted):
        assert len(envelope.id) == 32
        assert envelope.time > 1_700_000_000_000_000
        assert envelope.source == "shop"
        assert envelope.causation_id == "c1"
        assert envelope.correlation_id == "s1"
        assert envelope.actor == "ann"
        assert envelope.hops == 1
    assert placed.id != noted.id
    assert placed.body == b'{"ref":"o1"}'


@pytest.mark.requirement("R22")
async def test_without_a_cause_one_transaction_is_one_story(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        session.add(order := Order.place("o1"))
        await session.write_events()
        order.note("later")
        with originating(Origin(actor="bob")):
            await append(session, Noted("by hand"))
    async with sessions() as session, session.begin():
        session.add(Order.place("o2"))
    first, second, third, other = await database.envelopes()
    assert first.correlation_id == first.id
    assert {second.correlation_id, third.correlation_id} == {first.id}
    assert other.correlation_id == other.id
    assert [row.actor for row in (first, second, third)] == ["", "bob", ""]


async def test_events_leave_in_the_order_of_recording_with_the_entity_as_lane(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        first, second = Order.place("o1"), Order.place("o2")
        session.add_all([second, first])
        second.note("b")
        first.note("c")
    assert [row.body for row in await database.envelopes()] == [
        b'{"ref":"o1"}',
        b'{"ref":"o2"}',
        b'{"text":"b"}',
        b'{"text":"c"}',
    ]
    lanes = await database.read(select(outbox.c.lane).order_by(outbox.c.seq))
    subjects = [row.subject for row in await database.envelopes()]
    assert [row.lane.decode() for row in lanes] == subjects


# --- merge, cancel, look -------------------------------------------------------------------------


@pytest.mark.requirement("R45")
async def test_merged_events_are_one_row_and_cancelled_ones_none(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        session.add(order := Order.place("o1"))
        order.record(Noted("first"), merge="note")
        order.record(Noted("last"), merge="note")
        order.cancel_events(Placed)
    assert [row.body for row in await database.envelopes()] == [b'{"text":"last"}']


@pytest.mark.requirement("R29", "R46")
async def test_events_are_ordinary_rows_in_the_same_transaction(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session:
        session.add(Order.place("o1"))
        written = await session.write_events()
        found = (
            await session.execute(
                text(
                    "SELECT message_type, destination, body FROM sagacity_outbox WHERE seq = :seq"
                ),
                {"seq": written[0].seq},
            )
        ).one()
        assert tuple(found) == ("orders.Placed", "orders", b'{"ref":"o1"}')
        assert await database.published() == [], "nobody else sees them before the commit"
        await session.commit()
    assert await database.published() == ["Placed"]


# --- rollback ------------------------------------------------------------------------------------


@pytest.mark.requirement("R17")
async def test_when_the_work_fails_none_of_its_events_reach_anyone(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    with pytest.raises(RuntimeError, match="after three"):
        async with sessions() as session, session.begin():
            order = await session.get_one(Order, key)
            for text_ in ("a", "b", "c"):
                order.note(text_)
            raise RuntimeError("after three")
    assert await database.published() == []
    assert order.pending_events == ()


@pytest.mark.requirement("R17", "R32")
async def test_the_next_commit_does_not_publish_what_was_rolled_back(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session:
        order = await session.get_one(Order, key)
        order.rename("o2")
        await session.rollback()
        order.note("kept")
        await session.commit()
    assert await database.published() == ["Noted"]
    assert await database.refs() == ["o1"]


@pytest.mark.requirement("R17")
async def test_rolling_back_right_after_recording_takes_the_event_back(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session:
        session.add(order := Order(ref="o1"))
        await session.commit()
        order.note("outside of any statement")
        await session.rollback()
        await session.commit()
    assert await database.published() == []


async def test_a_new_entity_keeps_its_events_for_another_try(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    order = Order.place("o1")
    async with sessions() as session:
        session.add(order)
        await session.write_events()
        order.note("after writing")
        await session.rollback()
    assert list(order.pending_events) == [Placed("o1"), Noted("after writing")]
    async with sessions() as session, session.begin():
        session.add(order)
    assert await database.published() == ["Placed", "Noted"]


@pytest.mark.requirement("R32")
async def test_a_version_conflict_publishes_nothing(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session:
        order = await session.get_one(Order, key)
        await session.commit()
        async with sessions() as other, other.begin():
            await other.execute(update(Order).values(version=Order.version + 1))
        order.rename("o2")
        with pytest.raises(StaleDataError):
            await session.commit()
        await session.rollback()
    assert await database.published() == []


@pytest.mark.requirement("R32")
async def test_a_database_error_publishes_nothing(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    await stored(sessions)
    async with sessions() as session:
        session.add(Order.place("o2"))
        await session.write_events()
        session.add(Order.place("o1"))
        with pytest.raises(IntegrityError):
            await session.commit()
        await session.rollback()
        await session.commit()
    assert await database.published() == []


@pytest.mark.requirement("R32")
async def test_a_constraint_that_fails_at_commit_publishes_nothing(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    sqlite = database.engine.dialect.name == "sqlite"
    if sqlite:

        @event.listens_for(database.engine.sync_engine, "begin")
        def check_foreign_keys(connection: Connection) -> None:
            connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")

        @event.listens_for(database.engine.sync_engine, "checkout")
        def enforce(connection: Any, _record: object, _proxy: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")

    async with database.engine.begin() as connection:
        await connection.execute(
            text(
                "CREATE TABLE late (id INTEGER REFERENCES orders(id) DEFERRABLE INITIALLY DEFERRED)"
            )
        )
    async with sessions() as session:
        session.add(Order.place("o1"))
        await session.execute(text("INSERT INTO late VALUES (999)"))
        with pytest.raises(IntegrityError):
            await session.commit()
        await session.rollback()
        await session.commit()
    assert await database.published() == []


async def test_closing_the_session_without_commit_publishes_nothing(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session:
        (order := await session.get_one(Order, key)).note("lost")
        await session.write_events()
    assert await database.published() == []
    assert order.pending_events == ()


# --- savepoints ----------------------------------------------------------------------------------


@pytest.mark.requirement("R54")
async def test_events_of_a_savepoint_that_was_rolled_back_are_gone(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        order = await session.get_one(Order, key)
        order.note("before")
        with pytest.raises(RuntimeError):
            async with session.begin_nested():
                order.rename("o2")
                session.add(Order.place("o3"))
                raise RuntimeError
        assert list(order.pending_events) == [Noted("before")]
        await session.refresh(order)
        order.note("after")
    assert [row.body for row in await database.envelopes()] == [
        b'{"text":"before"}',
        b'{"text":"after"}',
    ]
    assert await database.refs() == ["o1"]


@pytest.mark.requirement("R54")
async def test_events_written_inside_a_savepoint_vanish_with_it(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        order = await session.get_one(Order, key)
        order.note("before")
        savepoint = await session.begin_nested()
        order.note("inside")
        assert len(await session.write_events()) == 2
        assert order.pending_events == ()
        await savepoint.rollback()
        assert list(order.pending_events) == [Noted("before")], "it was not written after all"
    assert [row.body for row in await database.envelopes()] == [b'{"text":"before"}']


@pytest.mark.requirement("R54")
async def test_releasing_a_savepoint_is_no_commit(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session:
        order = await session.get_one(Order, key)
        async with session.begin_nested():
            order.note("inner")
            await session.write_events()
        assert await database.published() == []
        await session.rollback()
        await session.commit()
    assert await database.published() == []


@pytest.mark.requirement("R54")
async def test_savepoints_in_savepoints(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    key = await stored(sessions)
    async with sessions() as session, session.begin():
        order = await session.get_one(Order, key)
        outer = await session.begin_nested()
        order.note("outer")
        inner = await session.begin_nested()
        order.note("inner")
        await inner.commit()
        another = await session.begin_nested()
        order.note("another")
        await another.rollback()
        assert list(order.pending_events) == [Noted("outer"), Noted("inner")]
        await outer.rollback()
        assert order.pending_events == ()
        async with session.begin_nested():
            order.note("kept")
    assert [row.body for row in await database.envelopes()] == [b'{"text":"kept"}']


@pytest.mark.requirement("R45", "R54")
async def test_a_rolled_back_savepoint_gives_back_what_it_merged_and_cancelled(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        session.add(order := Order.place("o1"))
        order.record(Noted("first"), merge="note")
        savepoint = await session.begin_nested()
        order.record(Noted("second"), merge="note")
        order.cancel_events(Placed)
        await savepoint.rollback()
    assert await database.published() == ["Placed", "Noted"]
    assert (await database.envelopes())[1].body == b'{"text":"first"}'


@pytest.mark.requirement("R54")
async def test_a_new_entity_of_a_rolled_back_savepoint_may_be_added_again(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    async with sessions() as session, session.begin():
        savepoint = await session.begin_nested()
        session.add(order := Order.place("o1"))
        await session.write_events()
        await savepoint.rollback()
        assert list(order.pending_events) == [Placed("o1")]
        session.add(order)
    assert await database.published() == ["Placed"]
    assert await database.refs() == ["o1"]


@pytest.mark.requirement("R54")
async def test_a_failed_flush_inside_a_savepoint_takes_only_its_own_events(
    sessions: async_sessionmaker[SagaSession], database: Database
) -> None:
    await stored(sessions)
    async with sessions() as session, session.begin():
        session.add(Order.place("o2"))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.add(Order.place("o1"))
    assert [row.body for row in await database.envelopes()] == [b'{"ref":"o2"}']


# --- without an ORM ------------------------------------------------------------------------------


@pytest.mark.requirement("R50")
async def test_events_are_appended_over_any_kind_of_transaction(database: Database) -> None:
    origin = Origin(source="shop", actor="ann", correlation_id="s1")

    def sync_session(connection: Any) -> None:
        with Session(connection, join_transaction_mode="rollback_only") as session:
            append(session, Noted("sync session"), origin=origin)
            session.commit()
        append(connection, [Noted("sync connection")], origin=origin, subject="Note/4")

    async with database.engine.begin() as connection:
        made = await append(connection, [Noted("connection"), Noted("2")], origin=origin)
        await connection.run_sync(sync_session)
    async with AsyncSession(database.engine) as session, session.begin():
        await append(session, Noted("session"), origin=origin)
    envelopes = await database.envelopes()
    assert envelopes[:2] == made
    assert [row.body for row in envelopes] == [
        b'{"text":"connection"}',
        b'{"text":"2"}',
        b'{"text":"sync session"}',
        b'{"text":"sync connection"}',
        b'{"text":"session"}',
    ]
    assert {row.actor for row in envelopes} == {"ann"}
    assert [row.subject for row in envelopes] == ["", "", "", "Note/4", ""]


@pytest.mark.requirement("R32", "R50")
async def test_appended_events_share_the_fate_of_the_transaction(database: Database) -> None:
    with pytest.raises(RuntimeError):
        async with database.engine.begin() as connection:
            await append(connection, Noted("lost"))
            raise RuntimeError
    assert await database.published() == []


@pytest.mark.requirement("R50")
async def test_an_entity_is_appended_with_all_it_has_pending(database: Database) -> None:
    plain = AsyncSession(database.engine, expire_on_commit=False)
    async with plain as session, session.begin():
        session.add(order := Order.place("o1"))
        order.note("x")
        await session.flush()
        made = await append(session, order)
    assert [row.subject for row in made] == [f"Order/{order.id}"] * 2
    assert await database.published() == ["Placed", "Noted"]
    assert order.pending_events == ()


@pytest.mark.requirement("R50", "R51")
async def test_nothing_is_drained_when_one_of_many_is_refused(database: Database) -> None:
    order = Order.place("o1")
    async with database.engine.begin() as connection:
        with pytest.raises(NotRecordable):
            await append(connection, [order, "no event"])  # type: ignore[list-item]
    assert list(order.pending_events) == [Placed("o1")]


async def test_autocommit_is_no_transaction(database: Database) -> None:
    async with database.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await append(connection, Noted("lost"))
    assert await database.published() == []


# --- set-up --------------------------------------------------------------------------------------


async def test_a_commit_that_wrote_events_nudges_the_relay_and_survives_it(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    nudges: list[int] = []

    def nudge() -> None:
        nudges.append(1)
        raise RuntimeError("relay is gone")

    sessions = session_factory(database.engine, nudge=nudge)
    async with sessions() as session:
        session.add(Order(ref="o0"))
        await session.commit()
        assert nudges == []
        session.add(Order.place("o1"))
        await session.commit()
    assert nudges == [1]
    assert await database.published() == ["Placed"]
    assert "Relay could not be nudged" in caplog.text


async def test_entities_of_another_database_are_refused(sqlite_url: str, tmp_path: Any) -> None:
    other = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}")
    async with fresh_database(sqlite_url) as database:
        async with other.begin() as connection:
            await connection.run_sync(Model.metadata.create_all)
        sessions = session_factory(database.engine, binds={Order: other, Line: other})
        async with sessions() as session:
            session.add(Order.place("o1"))
            with pytest.raises(ConfigurationError, match="another database"):
                await session.commit()
        async with other.begin() as connection:
            assert (await connection.execute(select(Order.id))).all() == []
    await other.dispose()


async def test_a_plain_session_says_that_it_loses_events(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    plain = AsyncSession(database.engine, expire_on_commit=False)
    async with plain as session:
        session.add(order := Order(ref="o1"))
        order.note("lost")
        async with session.begin_nested():
            pass
        assert caplog.text == ""
        await session.commit()
        assert "a plain session does not publish them" in caplog.text
        assert "entity=Order, events=1" in caplog.text
        caplog.clear()
        order.note("by hand")
        await append(session, order)
        await session.commit()
        assert caplog.text == ""
    assert await database.published() == ["Noted", "Noted"]


async def test_a_session_class_that_cannot_record_is_refused(database: Database) -> None:
    async with SagaSession(database.engine, sync_session_class=Session) as session:
        with pytest.raises(ConfigurationError, match="RecordingSession"):
            await session.write_events()


async def test_the_synchronous_session_publishes_too(tmp_path: Any) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'sync.db'}")
    metadata.create_all(engine)
    Model.metadata.create_all(engine)
    with RecordingSession(engine) as session, session.begin():
        session.add(Order.place("o1"))
    with engine.connect() as connection:
        assert [row.message_type for row in connection.execute(select(outbox))] == ["orders.Placed"]
    engine.dispose()
