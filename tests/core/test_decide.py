"""`decide`: what one message does to one instance. Driven through plans, looked at as values."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest

from sagacity.core.decide import (
    Cancel,
    Decision,
    Limits,
    RetryUndo,
    Sender,
    WaiveUndo,
    decide,
    timeout_envelope,
)
from sagacity.core.delivery import HOPS_MAX, Envelope
from sagacity.core.errors import HandlerError, LimitExceeded, NotRecordable, Suspended
from sagacity.core.instance import Compensation, Instance, Status
from sagacity.core.messages import Command, Event, Message
from sagacity.core.plan import Outcome
from sagacity.core.saga import Saga, State, defer, ignore, on, on_done, on_failure, on_timeout
from tests.core.driver import (
    SECOND,
    START,
    Numbered,
    World,
    definition_of,
    done,
    envelope_of,
    failed,
    reply_to,
)
from tests.core.sagas import (
    AccountCreated,
    AccountGeneration,
    AccountsNeeded,
    Book,
    EmailConfirmed,
    Notebook,
    Noted,
    Opened,
    ParallelTrip,
    Release,
    Sealed,
    Stored,
    Trip,
    TripChanged,
    TripRequested,
)

SENDER = Sender("tests")


def step(
    saga: type[Saga],
    message: Message,
    instance: Instance | None = None,
    *,
    sender: Sender = SENDER,
    **header: Any,
) -> Decision:
    """One message at one instance with key "b"."""
    envelope = envelope_of(message, header.pop("id", "m"), **header)
    return decide(definition_of(saga), instance, envelope, message, START, sender, key="b")


def begun(saga: type[Saga], message: Message | None = None, **header: Any) -> Instance:
    decision = step(saga, message or Opened("b"), id="start", **header)
    assert decision.instance is not None
    return decision.instance


def one_handler(handler: Callable[..., Any]) -> type[Saga]:
    """A saga that calls `handler` with the text of each `Noted`."""

    class Single(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str
        notes: list[str] = []

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Noted, when=opened, goto=(opened, shut))
        def note(self, event: Noted) -> Any:
            return handler(self, event)

        @on(Stored, key="other", field="text", when=opened)
        def stored(self) -> None: ...

        @on_timeout("end", when=opened, goto=shut)
        def end(self) -> None: ...

    return Single


def refusal(handler: Callable[..., Any]) -> str:
    """The text with which a handler is refused."""
    saga = one_handler(handler)
    with pytest.raises(HandlerError) as caught:
        step(saga, Noted("b", "x"), begun(saga))
    return str(caught.value)


# ---------------------------------------------------------------------------------- ids and headers


@pytest.mark.requirement("R1")
def test_commands_have_stable_ids_and_say_where_they_come_from() -> None:
    first = step(Trip, TripRequested("b"), id="m", correlation_id="c", actor="ann")
    again = step(Trip, TripRequested("b"), id="m", correlation_id="c", actor="ann")
    assert first == again
    other = step(Trip, TripRequested("b"), id="m2")
    assert {e.id for e in first.emitted}.isdisjoint(e.id for e in other.emitted)
    book = first.emitted[0]
    assert first.instance is not None
    assert (book.type, book.causation_id, book.correlation_id, book.actor) == (
        "bookings.Book",
        "m",
        "c",
        "ann",
    )
    assert (book.saga_type, book.saga_key, book.saga_uid) == ("Trip", "b", first.instance.uid)
    assert [e.sequence for e in first.emitted] == [1, 2, 3, 1]
    assert book.time == START


def test_an_event_is_for_everybody_and_carries_no_return_address() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Stored("b", "")), event(Noted("b", "x")))
    (published,) = world.sent
    assert (published.saga_type, published.saga_key, published.reply_to) == ("", "", "")
    assert published.correlation_id == "e1"


def test_a_command_says_where_replies_are_heard() -> None:
    sender = Sender("shop", reply_to="shop.replies", reply_topics=("a", "b"))
    decision = step(Trip, TripRequested("b"), sender=sender)
    assert {(e.reply_to, e.reply_topics) for e in decision.emitted} == {
        ("shop.replies", ("a", "b"))
    }


# ------------------------------------------------------------------------------------------ purity


@pytest.mark.requirement("R41")
@pytest.mark.requirement("R67")
def test_async_handlers_are_accepted_as_long_as_they_never_wait() -> None:
    async def inner(saga: Any, event: Noted) -> None:
        saga.notes.append(event.text)

    async def handler(saga: Any, event: Noted) -> None:
        await inner(saga, event)
        saga.goto(saga.shut)

    saga = one_handler(handler)
    decision = step(saga, Noted("b", "x"), begun(saga))
    assert decision.instance is not None
    assert decision.instance.state == "shut"


@pytest.mark.requirement("R41")
def test_a_handler_that_waits_is_refused_and_told_where_io_belongs() -> None:
    async def handler(saga: Any, event: Noted) -> None:
        await asyncio.sleep(0)

    saga = one_handler(handler)
    with pytest.raises(Suspended) as caught:
        step(saga, Noted("b", "x"), begun(saga))
    text = str(caught.value)
    assert "note" in text
    assert f"{__file__}:" in text
    assert text.endswith("Send a command and do the I/O in its @handles participant")


def test_handlers_return_nothing() -> None:
    assert "returned int; expected None" in refusal(lambda saga, event: 3)

    async def coroutine(saga: Any, event: Noted) -> str:
        return "x"

    assert "returned str; expected None" in refusal(coroutine)


def test_what_a_handler_sets_must_be_a_field() -> None:
    def handler(saga: Any, event: Noted) -> None:
        saga.notse = [event.text]

    assert "set self.notse, which is no field of the saga and would be lost" in refusal(handler)


def test_the_key_stays_as_it_is() -> None:
    def handler(saga: Any, event: Noted) -> None:
        saga.book = "another"

    assert "set the key field book to 'another'" in refusal(handler)


def test_changing_what_was_sent_or_received_changes_nothing_elsewhere() -> None:
    """A list in a command, in the data and in an event may be one object while the handler runs."""

    class Listed(Event, topic="notes"):
        book: str
        words: list[str]

    class Send(Command, topic="archive"):
        words: list[str]

    class Undo(Command, topic="archive"):
        words: list[str]

    class Aliasing(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str
        words: list[str] = []

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Listed, field=lambda e: ["a", "b"], when=opened, goto=(opened, shut))
        def note(self, event: Listed) -> None:
            self.words = event.words
            self.send(Send(self.words), undo=Undo(self.words))
            event.words.append(f"changed by {self.book}")
            self.words.append("changed again")

    world, event = World(Aliasing), Numbered()
    world.deliver(event(Opened("a")), event(Opened("b")))
    world.deliver(event(Listed("", ["x"])))
    assert [e.body for e in world.sent] == [b'{"words":["x"]}'] * 2
    assert [world.saga(k).words for k in "ab"] == [
        ["x", f"changed by {k}", "changed again"] for k in "ab"
    ]
    assert [world.one(k).ledger.undo[0].undo_body for k in "ab"] == [b'{"words":["x"]}'] * 2


def test_a_handler_that_raises_leaves_the_instance_as_it_was() -> None:
    def handler(saga: Any, event: Noted) -> None:
        saga.notes.append("half")
        saga.set_timeout("end", after=timedelta(seconds=1))
        raise KeyError("other half")

    saga = one_handler(handler)
    instance = begun(saga)
    before = msgspec.json.encode(instance)
    with pytest.raises(KeyError):
        step(saga, Noted("b", "x"), instance)
    assert msgspec.json.encode(instance) == before


def test_time_and_ids_come_from_the_step() -> None:
    seen: list[Any] = []

    def handler(saga: Any, event: Noted) -> None:
        seen.append((saga.now, saga.new_id(), saga.new_id(), saga.state, saga.key, saga.message.id))
        saga.goto(saga.shut)

    saga = one_handler(handler)
    instance = begun(saga)
    step(saga, Noted("b", "x"), instance)
    step(saga, Noted("b", "x"), instance)
    assert seen[0] == seen[1]
    now, first, second, *rest = seen[0]
    assert now == datetime.fromtimestamp(START / SECOND, UTC)
    assert first != second
    assert rest == ["opened", "b", "m"]


def test_a_saga_that_is_not_being_handled_says_so() -> None:
    with pytest.raises(HandlerError, match="only a handler that is being run can do this"):
        _ = Notebook(book="b").now


# ----------------------------------------------------------------------------- what handlers may ask


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (
            lambda s, e: s.send(e),
            "send expects commands, got Noted; publish events with self.publish",
        ),
        (lambda s, e: s.publish(Book("x")), "publish expects an event, got Book; send commands"),
        (
            lambda s, e: s.send(Book("x"), undo=EmailConfirmed("x")),
            "send expects commands, got Book with undo EmailConfirmed",
        ),
        (
            lambda s, e: (s.compensate("no"), s.send(Book("x"))),
            "cannot send Book after compensate; forward handling stops for good",
        ),
        (lambda s, e: s.set_timeout("other", after=timedelta(1)), "timeout 'other' has no handler"),
        (lambda s, e: s.set_timeout("end"), "set_timeout expects either after= or at="),
        (
            lambda s, e: s.set_timeout("end", at=datetime(2030, 1, 1)),
            "set_timeout expects an aware datetime, got the naive",
        ),
        (
            lambda s, e: s.set_timeout("end", at=datetime(1960, 1, 1, tzinfo=UTC)),
            "timeout 'end' is due out of range",
        ),
        (lambda s, e: s.correlate("nobody", "x"), "correlation key 'nobody' is not used by any"),
        (
            lambda s, e: s.correlate("other", 1.5),
            "expected text, an integer or a UUID, got float 1.5",
        ),
        (
            lambda s, e: s.goto(Notebook.sealed),
            "goto 'sealed' is not declared; expected one of opened, shut",
        ),
    ],
)
def test_what_a_handler_may_not_ask(handler: Callable[..., Any], text: str) -> None:
    said = refusal(handler)
    assert said.startswith("Single 'b' in state 'opened'") or "correlation key" in said
    assert text in said


def test_undo_goes_to_the_same_topic() -> None:
    class Elsewhere(Command, topic="elsewhere"):
        what: str

    text = refusal(lambda s, e: s.send(Book("x"), undo=Elsewhere("x")))
    assert "undo Elsewhere has topic 'elsewhere'; expected 'bookings'" in text


def test_a_handler_with_several_targets_says_where_to_go() -> None:
    class Undecided(Saga, key="book"):
        opened = State()
        left = State(final=True)
        right = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Noted, when=opened, goto=(left, right))
        def choose(self, event: Noted) -> None:
            if event.text:
                self.goto(self.left)

    instance = begun(Undecided)
    after = step(Undecided, Noted("b", "x"), instance).instance
    assert after is not None
    assert after.state == "left"
    with pytest.raises(HandlerError, match="did not say where to go; expected"):
        step(Undecided, Noted("b"), instance)


def test_a_message_that_cannot_be_encoded_is_refused_where_it_is_sent() -> None:
    saga = one_handler(lambda s, e: s.send(Book(cast("Any", object()))))
    with pytest.raises(NotRecordable):
        step(saga, Noted("b", "x"), begun(saga))


def test_pending_shows_what_nobody_has_answered() -> None:
    world, event = World(Trip), Numbered()
    world.deliver(event(TripRequested("t")))
    assert [p.type for p in world.one("t").ledger.pending.values()] == ["bookings.Book"] * 3 + [
        "mail.Notify"
    ]
    for command in world.sent[:3]:
        world.deliver(done(command))
    assert world.one("t").state == "booking"
    world.deliver(done(world.sent[3]))
    assert world.one("t").status is Status.COMPLETED


# ---------------------------------------------------------------------------- policies of the class


class Strict(Saga, key="book"):
    """Ignores what would wait, waits for what would be ignored."""

    locked = State()
    opened = State()
    shut = State(final=True)
    book: str
    notes: list[str] = []

    ignore(Noted, when=locked)
    defer(Stored, when=locked)

    @on(Opened, starts=True, goto=locked)
    def begin(self) -> None: ...

    @on(TripRequested, field="trip", when=locked, goto=opened)
    def unlock(self) -> None: ...

    @on(Noted, when=opened)
    def note(self, event: Noted) -> None:
        self.notes.append(event.text)

    @on(Stored, when=opened, goto=shut)
    def stored(self) -> None: ...


def test_ignore_and_defer_override_the_graph() -> None:
    world, event = World(Strict), Numbered()
    world.deliver(event(Opened("b")))
    early = [event(Noted("b", "early")), event(Stored("b", ""))]
    assert world.deliver(*early) == [Outcome.IGNORED, Outcome.DEFERRED]
    world.deliver(event(TripRequested("b")))
    assert world.saga("b").notes == []
    assert world.one("b").status is Status.COMPLETED


def test_late_is_ignored_and_says_why() -> None:
    world, event = World(AccountGeneration), Numbered()
    world.deliver(event(AccountsNeeded("b", "ann", ["crm"])))
    world.deliver(event(EmailConfirmed("ann")))
    instance = world.one("b")
    decision = step(AccountGeneration, EmailConfirmed("ann"), instance)
    assert decision == Decision(handled=False, reason="not expected in state 'creating'")
    world.deliver(reply_to(world.sent[0], AccountCreated("crm")))
    decision = step(AccountGeneration, EmailConfirmed("ann"), world.one("b"))
    assert decision.reason == "instance is completed"


# ------------------------------------------------------------------------------- restarts, identity


class Again(Saga, key="book", restartable=True):
    opened = State()
    shut = State(final=True)
    book: str
    notes: list[str] = []

    @on(Opened, starts=True, goto=opened)
    def begin(self) -> None:
        self.correlate("text", self.book)
        self.set_timeout("end", after=timedelta(seconds=5))

    @on(Noted, key="text", when=opened)
    def note(self, event: Noted) -> None:
        self.notes.append(event.text)

    @on(Sealed, when=opened, goto=shut)
    @on_timeout("end", when=opened, goto=shut)
    def end(self) -> None: ...


def test_a_restartable_saga_begins_anew_with_another_identity() -> None:
    world, event = World(Again), Numbered()
    world.deliver(event(Opened("b")), event(Noted("", "b")))
    first = world.one("b")
    (row,) = world.timeouts.values()
    assert world.deliver(event(Sealed("b")), event(Opened("b"))) == [Outcome.HANDLED] * 2
    second = world.one("b")
    assert second.uid != first.uid
    assert second.version > first.version
    assert world.saga("b").notes == []
    assert list(world.correlations) == [("Again", "text", "b", "b")]
    assert [t.uid for t in world.timeouts.values()] == [second.uid]
    stale = step(Again, Sealed("b"), second, saga_uid=first.uid)
    assert stale.reason == "meant for an earlier instance of this key"
    world.timeouts[row.uid, row.name] = row  # another worker still knows it
    assert world.deliver(row) == [Outcome.IGNORED]


def test_other_sagas_do_not_begin_anew() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Stored("b", "")), event(Sealed("b")))
    assert world.deliver(event(Opened("b"))) == [Outcome.IGNORED]


def test_a_reply_starts_nothing() -> None:
    """It was for an instance that has been cleaned away."""
    decision = step(Notebook, Opened("b"), saga_type="Notebook", saga_key="b", saga_uid="gone")
    assert decision.missing
    finished = begun(Again)
    finished = msgspec.structs.replace(finished, status=Status.COMPLETED)
    decision = step(Again, Opened("b"), finished, saga_uid=finished.uid)
    assert decision.reason == "instance is completed"


# ------------------------------------------------------------------------------------ code versions


def test_a_reply_to_another_saga_is_an_event_like_any_other() -> None:
    """Its answer to one saga is news to all others that listen; it may even begin one of them."""
    other: dict[str, Any] = {
        "saga_type": "Elsewhere",
        "saga_key": "x",
        "saga_uid": "u",
        "in_reply_to": "c",
    }
    begun = step(Again, Opened("b"), **other)
    assert begun.handled
    assert begun.instance is not None
    decision = step(Again, Sealed("b"), begun.instance, **other)
    assert decision.handled
    assert decision.instance is not None
    assert decision.instance.state == "shut"
    assert step(Again, Opened("b"), decision.instance, **other).handled


def test_data_of_newer_code_is_refused() -> None:
    instance = msgspec.structs.replace(begun(Notebook), schema_version=2)
    with pytest.raises(HandlerError, match="stored by version 2 of the class; expected 1 or"):
        step(Notebook, Stored("b", ""), instance)
    with pytest.raises(HandlerError, match="this worker runs older code"):
        step(Notebook, Noted("b"), instance)  # neither may it be deferred by rules of older code
    cancelled = step(Notebook, Cancel("stop"), instance).instance
    assert cancelled is not None
    assert cancelled.schema_version == 2


def test_an_unknown_state_is_refused() -> None:
    instance = msgspec.structs.replace(begun(Notebook), state="paused")
    with pytest.raises(HandlerError) as caught:
        step(Notebook, Stored("b", ""), instance)
    assert "is stored in state 'paused'; expected one of locked, unlocked, sealed" in str(
        caught.value
    )


def test_an_older_schema_is_read_and_rewritten() -> None:
    class Version2(Saga, key="book", version=2, name="Notebook"):
        locked = State()
        shut = State(final=True)
        book: str
        added: int = 7

        @on(Opened, starts=True, goto=locked)
        def begin(self) -> None: ...

        @on(Stored, when=locked, goto=shut)
        def end(self) -> None: ...

    after = step(Version2, Stored("b", ""), begun(Notebook)).instance
    assert after is not None
    assert (after.schema_version, after.data) == (2, b'{"book":"b","added":7}')


# ------------------------------------------------------------------------------------ compensation


def trip(saga: type[Saga] = Trip) -> World:
    world, event = World(saga), Numbered()
    world.deliver(event(TripRequested("t")))
    return world


def undos(world: World) -> list[bytes]:
    return [e.body for e in world.sent if e.undoes]


FLIGHT, HOTEL, CAR = b'{"what":"flight"}', b'{"what":"hotel"}', b'{"what":"car"}'


@pytest.mark.requirement("R65")
def test_undo_commands_go_newest_first_each_after_the_one_before() -> None:
    world = trip()
    world.deliver(failed(world.sent[2], "none left", refused=True))  # the car: nothing to undo
    instance = world.one("t")
    assert instance.status is Status.COMPENSATING
    assert instance.state == "booking"
    assert undos(world) == [HOTEL]
    undo = world.last("Release")
    assert undo.undoes == world.sent[1].id
    assert (undo.sequence, undo.topic) == (0, "bookings")
    world.deliver(done(undo))
    assert undos(world) == [HOTEL, FLIGHT]
    world.deliver(done(world.last("Release")))
    assert world.one("t").status is Status.COMPENSATED
    assert b"bookings.Book failed: none left" in world.transitions[-3].effects


def test_a_failure_with_unknown_outcome_is_undone_too() -> None:
    """Refused means: certainly no effect. Failed means: nobody knows."""
    world = trip()
    world.deliver(failed(world.sent[2], "no answer", refused=False))
    assert undos(world) == [CAR]


def test_parallel_undoes_everything_at_once() -> None:
    world = trip(ParallelTrip)
    world.deliver(failed(world.sent[0], refused=True))
    assert undos(world) == [CAR, HOTEL]
    for undo in [e for e in world.sent if e.undoes]:
        assert world.one("t").status is Status.COMPENSATING
        world.deliver(done(undo))
    assert world.one("t").status is Status.COMPENSATED


def test_a_late_success_during_compensation_is_undone_too() -> None:
    world = trip()
    world.control(Cancel("changed her mind"), "t")
    assert undos(world) == [CAR]
    assert world.deliver(done(world.sent[0])) == [Outcome.HANDLED]
    assert len(undos(world)) == 1
    for _ in range(3):
        world.deliver(done(world.last("Release")))
    assert undos(world) == [CAR, HOTEL, FLIGHT]
    assert world.one("t").status is Status.COMPENSATED
    assert world.one("t").ledger.pending.keys() == {e.id for e in world.sent[1:4]}


def test_a_refusal_during_compensation_needs_no_undo() -> None:
    world = trip()
    world.control(Cancel("stop"), "t")
    world.deliver(failed(world.sent[1], refused=True))
    world.deliver(done(world.last("Release")))
    world.deliver(done(world.last("Release")))
    assert undos(world) == [CAR, FLIGHT]
    assert world.one("t").status is Status.COMPENSATED


def test_forward_handling_stops_for_good() -> None:
    world = trip()
    world.control(Cancel("stop"), "t")
    event = Numbered()
    event.count = 9
    assert world.deliver(event(TripChanged("t"))) == [Outcome.IGNORED]
    assert world.saga("t").notified is False


def test_nothing_sent_is_compensated_at_once() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Noted("b", "early")))
    world.control(Cancel("stop"), "b")
    instance = world.one("b")
    assert (instance.status, instance.ledger.deferred) == (Status.COMPENSATED, ())
    assert world.timeouts == {}


def stuck(saga: type[Saga] = Trip) -> World:
    world = trip(saga)
    world.control(Cancel("stop"), "t")
    world.deliver(failed(world.last("Release"), "on strike"))
    return world


def compensation(world: World) -> Compensation:
    found = world.one("t").ledger.compensation
    assert found is not None
    return found


@pytest.mark.requirement("R7")
def test_an_undo_that_fails_for_good_leaves_the_instance_stuck_until_retried() -> None:
    world = stuck()
    assert world.one("t").status is Status.STUCK
    assert list(compensation(world).errors.values()) == ["on strike"]
    first = world.last("Release")
    world.control(RetryUndo("strike is over"), "t")
    assert world.one("t").status is Status.COMPENSATING
    again = world.last("Release")
    assert (again.body, again.undoes) == (first.body, first.undoes)
    assert again.id != first.id
    late = msgspec.structs.replace(done(first), id="late")
    assert world.deliver(late) == [Outcome.IGNORED]
    for _ in range(3):
        world.deliver(done(world.last("Release")))
    assert world.one("t").status is Status.COMPENSATED
    assert undos(world) == [CAR, CAR, HOTEL, FLIGHT]


def test_a_waived_undo_is_noted_with_its_reason() -> None:
    world = stuck()
    world.control(WaiveUndo("released by telephone"), "t")
    assert undos(world) == [CAR, HOTEL]
    assert compensation(world).waived == {world.sent[2].id: "released by telephone"}
    for _ in range(2):
        world.deliver(done(world.last("Release")))
    assert world.one("t").status is Status.COMPENSATED


def test_a_refusal_frees_an_instance_that_is_stuck_on_its_undo() -> None:
    world = stuck()
    world.deliver(failed(world.sent[2], "never was", refused=True))
    assert world.one("t").status is Status.COMPENSATING
    assert undos(world) == [CAR, HOTEL]


def test_an_undo_that_fails_after_its_command_was_refused_holds_up_nothing() -> None:
    world = trip()
    world.control(Cancel("stop"), "t")
    world.deliver(failed(world.sent[2], "never was", refused=True))
    world.deliver(failed(world.last("Release"), "nothing to release"))
    assert world.one("t").status is Status.COMPENSATING
    assert undos(world) == [CAR, HOTEL]


def test_in_parallel_the_others_go_on_and_retry_keeps_the_order() -> None:
    world = trip(ParallelTrip)
    world.control(Cancel("stop"), "t")
    car, hotel, flight = [e for e in world.sent if e.undoes]
    world.deliver(failed(flight), failed(car))
    assert world.one("t").status is Status.COMPENSATING
    world.deliver(done(hotel))
    assert world.one("t").status is Status.STUCK
    world.control(RetryUndo(), "t")
    assert undos(world)[3:] == [CAR, FLIGHT]


def test_in_parallel_no_step_sends_more_than_the_limit() -> None:
    world = World(ParallelTrip, limits=Limits(commands_max=3))
    world.deliver(Numbered()(TripRequested("t")))
    world.catalog = msgspec.structs.replace(
        world.catalog, sender=Sender("tests", limits=Limits(commands_max=2, payload_bytes_max=1))
    )
    world.control(Cancel("stop"), "t")
    assert undos(world) == [CAR, HOTEL]
    world.deliver(done(world.last("Release")))
    assert undos(world) == [CAR, HOTEL, FLIGHT]


@pytest.mark.parametrize("message", [RetryUndo("x"), WaiveUndo("x")])
def test_an_operators_word_that_does_not_apply_is_ignored(message: RetryUndo | WaiveUndo) -> None:
    world = trip()
    assert world.control(message, "t") == [Outcome.IGNORED]
    world.control(Cancel("stop"), "t")
    assert world.control(Cancel("again"), "t") == [Outcome.IGNORED]


def test_an_operator_does_not_wait_behind_a_message_that_failed() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Stored("b", "")), event(Noted("b", "bad")))
    assert world.control(Cancel("stop"), "b") == [Outcome.HANDLED]


def test_compensate_in_a_handler_with_goto_and_reason() -> None:
    world, event = World(AccountGeneration), Numbered()
    world.deliver(event(AccountsNeeded("o", "ann", ["crm", "erp"])))
    world.deliver(event(EmailConfirmed("ann")))
    world.deliver(failed(world.sent[0], "taken", refused=True))
    instance = world.one("o")
    assert (instance.state, instance.status) == ("refused", Status.COMPENSATING)
    assert b"accounts could not be created" in world.transitions[-1].effects
    world.deliver(done(world.last("ReleaseAccount")))
    assert world.one("o").status is Status.COMPENSATED
    assert world.correlations == {}


# --------------------------------------------------------------------------------- answers to commands


class Patient(Saga, key="book"):
    """Looks at answers only once it is ready."""

    busy = State()
    ready = State()
    shut = State(final=True)
    book: str
    seen: list[str] = []
    open_commands: int = -1

    @on(Opened, starts=True, goto=busy)
    def begin(self) -> None:
        self.send(Book("one"), undo=Release("one"))

    @on(Stored, when=busy, goto=ready)
    def get_ready(self) -> None:
        self.open_commands = len(self.pending)

    @on_done(Book, when=ready, goto=shut)
    def was_done(self) -> None:
        self.seen.append("done")

    @on_failure(Book, when=ready, goto=shut)
    def has_failed(self) -> None:
        self.seen.append("failed")


@pytest.mark.parametrize("answer", [done, failed])
def test_an_early_answer_waits_and_its_command_stays_pending(
    answer: Callable[[Envelope], Envelope],
) -> None:
    world, event = World(Patient), Numbered()
    world.deliver(event(Opened("b")))
    assert world.deliver(answer(world.sent[0])) == [Outcome.DEFERRED]
    world.deliver(event(Stored("b", "")))
    assert world.saga("b").open_commands == 1
    assert world.saga("b").seen == [answer.__name__]
    assert world.one("b").ledger.pending == {}


def test_an_early_refusal_counts_when_the_saga_is_cancelled() -> None:
    world, event = World(Patient), Numbered()
    world.deliver(event(Opened("b")))
    world.deliver(failed(world.sent[0], refused=True))
    world.control(Cancel("stop"), "b")
    assert world.one("b").status is Status.COMPENSATED
    assert undos(world) == []


def test_an_answer_to_no_pending_command_is_ignored() -> None:
    """A second answer may not undo what the first one settled."""
    world = trip()
    world.deliver(done(world.sent[0]))
    twice = msgspec.structs.replace(failed(world.sent[0]), id="another")
    assert world.deliver(twice) == [Outcome.IGNORED]
    assert world.one("t").status is Status.RUNNING


def test_a_message_answered_by_an_event_is_confirmed() -> None:
    world, event = World(AccountGeneration), Numbered()
    world.deliver(event(AccountsNeeded("o", "ann", ["crm", "erp"])))
    world.deliver(event(EmailConfirmed("ann")))
    world.deliver(reply_to(world.sent[1], AccountCreated("erp")))
    ledger = world.one("o").ledger
    assert [entry.confirmed for entry in ledger.undo] == [False, True]
    assert list(ledger.pending) == [world.sent[0].id]


# ----------------------------------------------------------------------------------------- limits


class Pinged(Event, topic="game"):
    game: str


class Ponged(Event, topic="game"):
    game: str


class Ping(Saga, key="game"):
    playing = State()
    over = State(final=True)
    game: str

    @on(Opened, field="book", starts=True, goto=playing)
    @on(Ponged, when=playing, goto=(playing, over))
    def play(self) -> None:
        self.publish(Pinged(self.game))


class Pong(Saga, key="game"):
    playing = State()
    over = State(final=True)
    game: str

    @on(Pinged, starts=True, when=playing, goto=(playing, over))
    def play(self) -> None:
        if not self.state:
            self.goto(self.playing)
        self.publish(Ponged(self.game))


def test_sagas_that_answer_each_other_in_a_circle_come_to_an_end() -> None:
    world, event = World(Ping, Pong), Numbered()
    world.deliver(event(Opened("g")))
    count = 0
    while count < len(world.sent):
        world.deliver(world.sent[count])
        count += 1
    assert count == HOPS_MAX
    assert "sagas that start or answer each other in a circle never end" in world.dead[0].error


class Chunk(Command, topic="chunks"):
    number: int


class Chunked(Saga, key="book"):
    working = State()
    over = State(final=True)
    book: str
    count: int = 0

    @on(Opened, starts=True, goto=working)
    @on_done(Chunk, when=working, goto=(working, over))
    def next(self) -> None:
        self.count += 1
        self.send(Chunk(self.count))


def test_a_long_chain_of_replies_is_no_circle() -> None:
    instance = begun(Chunked)
    definition = definition_of(Chunked)
    command = step(Chunked, Opened("b"), id="start").emitted[0]
    from sagacity.core.messages import CommandDone

    for _ in range(10_000):
        answer = CommandDone(command.id, command.type)
        envelope = reply_to(command, answer)
        decision = decide(definition, instance, envelope, answer, START, SENDER)
        assert decision.instance is not None
        instance, (command,) = decision.instance, decision.emitted
    assert command.hops == 1


def test_a_reply_to_somebody_else_is_a_hop_further() -> None:
    """Else two sagas could go on for ever by each other's replies."""
    instance = begun(Ping, Opened("b"))
    decision = step(Ping, Ponged("b"), instance, in_reply_to="x", saga_uid="", hops=40)
    assert decision.emitted[0].hops == 41


class Greedy(Saga, key="book"):
    opened = State()
    shut = State(final=True)
    book: str
    text: str = ""

    @on(Opened, starts=True, goto=opened)
    def begin(self) -> None: ...

    @on(Stored, when=opened, goto=(opened, shut))
    def grow(self, event: Stored) -> None:
        self.text = event.text * 10

    @on(Noted, when=opened)
    def spam(self, event: Noted) -> None:
        for _ in range(int(event.text)):
            self.send(Book("x"), undo=Release("x" * int(event.text)))


@pytest.mark.parametrize(
    ("message", "limits", "text"),
    [
        (Noted("b", "11"), Limits(commands_max=10), "one step sends more than 10 messages"),
        (Stored("b", "0123456789"), Limits(state_bytes_max=99), "the data has "),
        (Noted("b", "1"), Limits(payload_bytes_max=11), "bookings.Book has 12 bytes"),
        (Noted("b", "90"), Limits(payload_bytes_max=80), "bookings.Release has 101 bytes"),
    ],
)
def test_limits_of_a_step(message: Message, limits: Limits, text: str) -> None:
    sender = Sender("tests", limits=limits)
    with pytest.raises(LimitExceeded) as caught:
        step(Greedy, message, begun(Greedy), sender=sender)
    assert str(caught.value).startswith("Greedy 'b': ")
    assert text in str(caught.value)
    assert "expected" in str(caught.value) or "more than" in str(caught.value)


def test_as_many_commands_as_the_limit_are_sent() -> None:
    sender = Sender("tests", limits=Limits(commands_max=10))
    decision = step(Greedy, Noted("b", "10"), begun(Greedy), sender=sender)
    assert len(decision.emitted) == 10


# ---------------------------------------------------------------------------------------- timeouts


def test_a_due_timeout_has_the_same_id_however_often_it_is_found() -> None:
    def made() -> Envelope:
        return timeout_envelope(
            uid="u", name="n", generation=3, due_at=5, saga_type="S", saga_key="k"
        )

    assert made() == made()
    assert made().id.startswith("timeout:")
    assert made().time == 5


def test_timeouts_at_and_after() -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    saga = one_handler(
        lambda s, e: (
            (s.set_timeout("end", at=at), s.goto(s.opened))[1]
            if e.text == "at"
            else (s.set_timeout("end", after=timedelta(milliseconds=1.5)), s.goto(s.opened))[1]
        )
    )
    instance = begun(saga)
    decision = step(saga, Noted("b", "at"), instance)
    assert decision.timeouts["end"].due_at == int(at.timestamp()) * SECOND
    decision = step(saga, Noted("b", "after"), instance)
    assert decision.timeouts["end"].due_at == START + 1500
