"""Subscribers of the publisher's own process: inside its transaction, or after it and lossy."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import create_engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker

from sagacity.backends.sql.append import append
from sagacity.backends.sql.session import (
    Recording,
    RecordingSession,
    SagaSession,
    SubscriberFailure,
    session_factory,
)
from sagacity.backends.sql.tables import dead_letter, metadata, outbox
from sagacity.core.errors import ConfigurationError, NotRecordable, StoreError
from sagacity.core.messages import Event
from sagacity.core.plan import OutboxRow
from sagacity.recording import Mode, Origin, Subscriber, envelope_of, recorded
from sagacity.service import Context, Service, subscribes
from tests.backends.sql.orders import (
    Database,
    Model,
    Noted,
    Order,
    Placed,
    Renamed,
    Seat,
    fresh_database,
)

pytestmark = pytest.mark.asyncio

Sessions = async_sessionmaker[SagaSession]


@pytest_asyncio.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    async with fresh_database(store_url) as database:
        yield database


def inside(event: type[Event], function: Callable[..., Any], name: str = "") -> Subscriber:
    return Subscriber(event=event, function=function, mode=Mode.IN_TRANSACTION, name=name)


def after(event: type[Event], function: Callable[..., Any], name: str = "") -> Subscriber:
    return Subscriber(event=event, function=function, mode=Mode.AFTER_COMMIT, name=name)


async def place(sessions: Sessions, *refs: str) -> None:
    async with sessions() as session, session.begin():
        session.add_all([Order.place(ref) for ref in refs])


# --- who is called -------------------------------------------------------------------------------


@pytest.mark.requirement("R20")
async def test_an_event_calls_none_or_many_by_its_declared_type(database: Database) -> None:
    calls: list[tuple[str, str]] = []

    def note(name: str) -> Callable[[Event], None]:
        return lambda event: calls.append((name, type(event).__name__))

    subscribers = [
        after(Placed, note("first"), "first"),
        after(Event, note("all"), "all"),
        after(Renamed, note("renamed"), "renamed"),
        inside(Placed, note("inside"), "inside"),
    ]
    sessions = session_factory(database.engine, subscribers=subscribers)
    await place(sessions, "o1")
    assert calls == [("inside", "Placed"), ("first", "Placed"), ("all", "Placed")]
    async with session_factory(database.engine)() as session, session.begin():
        session.add(Order.place("o2"))
    assert len(calls) == 3
    assert await database.published() == ["Placed", "Placed"]


@pytest.mark.requirement("R20")
async def test_a_service_brings_its_own_subscribers(database: Database) -> None:
    calls: list[str] = []

    @subscribes(Placed, mode="in_transaction")
    async def count(event: Placed, context: Context) -> None:
        calls.append(f"count {context.message_id[:0]}{event.ref} {context.origin.source}")

    @subscribes(Event, Placed, mode="after_commit")
    def once(event: Event) -> None:
        calls.append("once")

    @subscribes(Placed)
    async def over_the_bus(event: Placed) -> None:
        calls.append("never here")

    service = Service("shop", handlers=[count, once, over_the_bus])
    sessions = session_factory(database.engine, service=service)
    await place(sessions, "o1")
    assert calls == ["count o1 shop", "once"]
    assert [row.source for row in await database.envelopes()] == ["shop"]


# --- inside the transaction ----------------------------------------------------------------------


@pytest.mark.requirement("R43")
@pytest.mark.parametrize("style", ["begin", "commit"])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_subscriber_inside_the_transaction_may_veto_it_all(
    database: Database, style: str, kind: str
) -> None:
    async def veto(event: Placed, context: Context) -> None:
        context.session.add(Seat(train="IC 5", number=1))
        await context.session.flush()
        raise ValueError(f"not {event.ref}")

    def veto_at_once(event: Placed) -> None:
        raise ValueError(f"not {event.ref}")

    called_after: list[Event] = []
    sessions = session_factory(
        database.engine,
        subscribers=[
            inside(Placed, veto if kind == "async" else veto_at_once),
            after(Placed, called_after.append),
        ],
    )
    with pytest.raises(ValueError, match="not o1"):
        if style == "begin":
            await place(sessions, "o1")
        else:
            async with sessions() as session:
                session.add(Order.place("o1"))
                try:
                    await session.commit()
                finally:
                    assert not session.in_transaction()
                    await session.commit()
    assert await database.published() == []
    assert await database.refs() == []
    assert await database.count(Seat) == 0
    assert called_after == []


@pytest.mark.requirement("R43")
async def test_a_vetoed_transaction_cannot_be_committed_after_all(database: Database) -> None:
    calls: list[str] = []

    def veto_once(event: Placed) -> None:
        calls.append(event.ref)
        if len(calls) == 1:
            raise ValueError("no")

    sessions = session_factory(database.engine, subscribers=[inside(Placed, veto_once)])
    async with sessions() as session:
        transaction = await session.begin()
        session.add(Order.place("o1"))
        with pytest.raises(ValueError, match="no"):
            await transaction.commit()  # the transaction's own commit, not the session's
        with pytest.raises(StoreError, match="roll it back"):
            await transaction.commit()
        await transaction.rollback()
    assert await database.published() == []


@pytest.mark.requirement("R43", "R46")
async def test_a_subscriber_inside_sees_and_joins_the_transaction(database: Database) -> None:
    async def take_seat(event: Placed, context: Context) -> None:
        session = context.session
        rows = (await session.execute(select(func.count()).select_from(outbox))).scalar_one()
        session.add(Seat(train=event.ref, number=rows))

    sessions = session_factory(database.engine, subscribers=[inside(Placed, take_seat)])
    await place(sessions, "o1")
    assert await database.read(select(Seat.train, Seat.number)) == [("o1", 1)]


@pytest.mark.requirement("R22", "R23")
async def test_what_a_subscriber_inside_records_follows_from_its_event(database: Database) -> None:
    async def follow(event: Placed, context: Context) -> None:
        order = (await context.session.scalars(select(Order))).one()
        order.note(f"after {event.ref}")
        context.publish(Renamed("sent"))

    sessions = session_factory(
        database.engine, service="shop", subscribers=[inside(Placed, follow)]
    )
    async with sessions() as session, session.begin():
        session.origin = Origin(actor="ann", correlation_id="s1")
        session.add(Order.place("o1"))
    placed, *follows = await database.envelopes()
    assert sorted(row.type for row in follows) == ["orders.Noted", "orders.Renamed"]
    for row in follows:
        assert row.causation_id == placed.id
        assert (row.correlation_id, row.actor, row.hops, row.source) == ("s1", "ann", 1, "shop")


async def test_subscribers_that_answer_each_other_without_end_are_stopped(
    database: Database,
) -> None:
    async def again(event: Event, context: Context) -> None:
        (await context.session.scalars(select(Order))).one().note("again")

    sessions = session_factory(database.engine, subscribers=[inside(Event, again)])
    with pytest.raises(NotRecordable, match="answer each other"):
        await place(sessions, "o1")
    assert await database.published() == []


async def test_events_of_a_rolled_back_savepoint_are_shown_to_nobody(database: Database) -> None:
    seen: list[Event] = []
    sessions = session_factory(
        database.engine,
        subscribers=[inside(Event, seen.append, "in"), after(Event, seen.append, "after")],
    )
    async with sessions() as session, session.begin():
        savepoint = await session.begin_nested()
        await append(session, Noted("inner"))
        await savepoint.rollback()
        await append(session, Noted("outer"))
        assert seen == []
    assert seen == [Noted("outer"), Noted("outer")]


async def test_an_async_subscriber_needs_an_async_session() -> None:
    async def follow(event: Placed) -> None: ...

    recording = Recording(subscribers=(inside(Placed, follow),))

    def commit_in_a_thread() -> None:  # where nobody could await
        engine = create_engine("sqlite://")
        metadata.create_all(engine)
        Model.metadata.create_all(engine)
        with RecordingSession(engine, recording=recording) as session:
            session.add(Order.place("o1"))
            with pytest.raises(ConfigurationError, match="async subscriber"):
                session.commit()
        engine.dispose()

    await asyncio.to_thread(commit_in_a_thread)


# --- after the commit ----------------------------------------------------------------------------


@pytest.mark.requirement("R16")
async def test_a_subscriber_after_commit_sees_the_publishers_rows(database: Database) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    async def look(event: Placed) -> None:
        seen.append((await database.refs(), await database.published()))

    async def look_inside(event: Placed) -> None:
        seen.append((await database.refs(), await database.published()))

    sessions = session_factory(
        database.engine,
        subscribers=[after(Placed, look, "look"), inside(Placed, look_inside, "inside")],
    )
    await place(sessions, "o1")
    assert seen == [([], []), (["o1"], ["Placed"])], "over a connection of its own"


@pytest.mark.requirement("R26", "R55")
async def test_a_failing_subscriber_leaves_a_record_and_its_siblings_run(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    reached: list[str] = []
    told: list[SubscriberFailure] = []

    def refuse(event: Placed) -> None:
        raise LookupError(f"no mailbox for {event.ref}")

    async def refuse_later(event: Placed) -> None:
        await asyncio.sleep(0)
        raise OSError("gateway is down")

    recording = Recording(
        service="shop",
        subscribers=(
            after(Placed, refuse, "mail"),
            after(Placed, refuse_later, "chat"),
            after(Placed, lambda event: reached.append(event.ref), "count"),
        ),
        failed=told.append,
    )
    sessions = session_factory(database.engine, recording=recording)
    await place(sessions, "o1")
    assert reached == ["o1"]
    assert await database.refs() == ["o1"], "what was committed stays"
    assert await database.published() == ["Placed"]
    failures = await database.failures()
    assert [row.consumer for row in failures] == [b"mail", b"chat"]
    (envelope,) = await database.envelopes()
    for row, told_of in zip(failures, told, strict=True):
        assert row.message_id == envelope.id.encode()
        assert row.message_type == b"orders.Placed"
        assert not row.decoded
        assert told_of.error.encode() == row.error
    assert b"Traceback" in failures[0].error
    assert b"in refuse\n" in failures[0].error
    assert b"LookupError: no mailbox for o1" in failures[0].error
    assert b"OSError: gateway is down" in failures[1].error
    assert "lossy" in caplog.text
    assert "in refuse_later" in caplog.text


@pytest.mark.requirement("R26")
async def test_a_failure_is_not_repeated_with_the_next_commit(database: Database) -> None:
    calls: list[str] = []

    def refuse(event: Event) -> None:
        calls.append(type(event).__name__)
        raise ValueError

    sessions = session_factory(database.engine, subscribers=[after(Event, refuse)])
    async with sessions() as session:
        session.add(order := Order.place("o1"))
        await session.commit()
        order.note("more")
        await session.commit()
        await session.commit()
    assert calls == ["Placed", "Noted"]
    assert len(await database.failures()) == 2


@pytest.mark.requirement("R26")
async def test_a_failure_that_cannot_be_stored_is_logged_all_the_same(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(event: Event) -> None:
        raise ValueError("first")

    def hook(failure: SubscriberFailure) -> None:
        raise ValueError("second")

    recording = Recording(subscribers=(after(Event, refuse),), failed=hook)
    sessions = session_factory(database.engine, recording=recording)
    async with database.engine.begin() as connection:
        await connection.run_sync(dead_letter.drop)
    await place(sessions, "o1")
    assert "ValueError: first" in caplog.text
    assert "Failures could not be kept" in caplog.text
    assert "Failure hook failed" in caplog.text
    assert await database.published() == ["Placed"]


@pytest.mark.requirement("R17", "R54")
@pytest.mark.parametrize("fails", ["work", "constraint"])
async def test_after_a_rollback_nobody_is_called(database: Database, fails: str) -> None:
    calls: list[Event] = []
    sessions = session_factory(database.engine, subscribers=[after(Event, calls.append)])
    await place(session_factory(database.engine), "taken")
    with pytest.raises((RuntimeError, IntegrityError)):
        async with sessions() as session, session.begin():
            session.add(Order.place("o1"))
            await session.write_events()
            if fails == "work":
                raise RuntimeError
            session.add(Order.place("taken"))
    assert calls == []
    await place(sessions, "o2")
    assert calls == [Placed("o2")]


@pytest.mark.requirement("R54")
async def test_savepoints_call_nobody_until_the_commit(database: Database) -> None:
    calls: list[Event] = []
    sessions = session_factory(database.engine, subscribers=[after(Event, calls.append)])
    async with sessions() as session:
        async with session.begin_nested():
            session.add(Order.place("o1"))
        assert calls == []
        with pytest.raises(RuntimeError):
            async with session.begin_nested():
                session.add(Order.place("o2"))
                raise RuntimeError
        await session.commit()
        assert calls == [Placed("o1")]


@pytest.mark.requirement("R54")
@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only"])
async def test_a_session_inside_an_outer_transaction_does_not_take_its_commit_for_real(
    database: Database, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Event] = []
    nudges: list[int] = []
    recording = Recording(subscribers=(after(Event, calls.append),), nudge=lambda: nudges.append(1))
    async with database.engine.connect() as connection:
        outer = await connection.begin()
        async with SagaSession(
            connection, recording=recording, join_transaction_mode=mode
        ) as session:
            session.add(Order.place("o1"))
            await session.commit()
        assert calls == []
        assert nudges == []
        await outer.rollback()
    assert "outer transaction" in caplog.text
    assert await database.published() == []


@pytest.mark.requirement("R53")
async def test_a_cancelled_task_loses_what_was_not_called_yet(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []

    async def cancel(event: Placed) -> None:
        called.append("first")
        raise asyncio.CancelledError

    sessions = session_factory(
        database.engine,
        subscribers=[
            after(Placed, cancel, "first"),
            after(Placed, lambda event: called.append("second"), "second"),
        ],
    )
    with pytest.raises(asyncio.CancelledError):
        await place(sessions, "o1")
    assert called == ["first"]
    assert await database.published() == ["Placed"], "the events themselves are safe"
    assert "cut short, this mode is lossy (called=1, lost=1)" in caplog.text


DIES_IN_THE_WINDOW = """
import asyncio, os, sys
from sagacity.backends.sql.session import session_factory
from sagacity.recording import Mode, Subscriber
from tests.backends.sql.orders import Order, Placed, fresh_database

def die(event):
    os._exit(9)

def never(event):
    print("called", flush=True)

async def main(url):
    async with fresh_database(url) as database:
        subscribers = [
            Subscriber(event=Placed, function=function, mode=Mode.AFTER_COMMIT)
            for function in (die, never)
        ]
        async with session_factory(database.engine, subscribers=subscribers)() as session:
            session.add(Order.place("o1"))
            await session.commit()

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.requirement("R53")
async def test_the_loss_window_of_after_commit_is_the_time_between_commit_and_call(
    sqlite_url: str,
) -> None:
    """A process that dies in the window has committed, and never calls what was left."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", DIES_IN_THE_WINDOW, sqlite_url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    assert "called" not in done.stdout
    called: list[Event] = []
    async with fresh_database(sqlite_url) as database:
        sessions = session_factory(database.engine, subscribers=[after(Event, called.append)])
        await place(sessions, "o2")
        assert called == [Placed("o2")], "o1 is not called again: lossy, as the name says"
        assert await database.published() == ["Placed", "Placed"], "over the bus it still leaves"


@pytest.mark.requirement("R55")
async def test_after_the_commit_there_is_no_session_and_no_sending(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def use_session(event: Placed, context: Context) -> None:
        context.session.add(Order(ref="late"))

    def send(event: Placed, context: Context) -> None:
        context.publish(Noted("late"))

    sessions = session_factory(
        database.engine, subscribers=[after(Placed, use_session), after(Placed, send)]
    )
    await place(sessions, "o1")
    failures = await database.failures()
    assert b"no session after the commit" in failures[0].error
    assert b"sends messages after the commit" in failures[1].error
    assert await database.refs() == ["o1"]
    assert await database.published() == ["Placed"]


# --- intent --------------------------------------------------------------------------------------


class Registered(Event, topic="users"):
    user: str


class Invited(Event, topic="users"):
    user: str


class SignedUpByPhone(Event, topic="users"):
    user: str


class Imported(Event, topic="users"):
    user: str


@pytest.mark.requirement("R57")
async def test_the_event_says_why_so_three_ways_of_registering_welcome_and_import_does_not(
    database: Database,
) -> None:
    welcomed: list[str] = []

    @subscribes(Registered, Invited, SignedUpByPhone, mode="after_commit")
    def welcome(event: Event) -> None:
        assert isinstance(event, (Registered, Invited, SignedUpByPhone))
        welcomed.append(event.user)

    service = Service("users", handlers=[welcome])
    sessions = session_factory(database.engine, service=service)
    ways = {
        "ann": Registered("ann"),
        "bob": Invited("bob"),
        "cid": SignedUpByPhone("cid"),
        "dan": Imported("dan"),
    }
    for name, event in ways.items():
        async with sessions() as session, session.begin():
            user = Seat(train=name, number=1)  # the same row in all four cases
            session.add(user)
            user.record(event)
    assert welcomed == ["ann", "bob", "cid"]
    types = {row.type for row in await database.envelopes()}
    assert types == {"users.Registered", "users.Invited", "users.SignedUpByPhone", "users.Imported"}


async def test_rows_may_be_appended_as_they_are(database: Database) -> None:
    envelope = envelope_of(recorded(Noted("made")), message_id="m1", origin=Origin())
    sessions = session_factory(database.engine)
    async with sessions() as session, session.begin():
        await session.append_envelopes([OutboxRow("lane", envelope)])
    assert await database.envelopes() == [envelope]
