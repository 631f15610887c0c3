"""`plan_batch`: what one transaction writes for many messages."""

from __future__ import annotations

import itertools
from datetime import timedelta

import msgspec
import pytest

from sagacity.core.batch import plan_batch
from sagacity.core.decide import Cancel, Limits
from sagacity.core.instance import Status
from sagacity.core.messages import Event
from sagacity.core.plan import Known, Loaded, Outcome
from sagacity.core.routing import Retry
from sagacity.core.saga import Missing, Saga, State, on, on_timeout
from tests.core.driver import SECOND, START, Numbered, World, envelope_of, failed, reply_to
from tests.core.sagas import (
    AccountCreated,
    AccountGeneration,
    AccountsNeeded,
    Asked,
    Checked,
    EmailConfirmed,
    Notebook,
    Noted,
    Opened,
    Packed,
    Paid,
    Reminded,
    Sealed,
    Shipping,
    Stored,
    Trip,
    TripRequested,
)

HANDLED, IGNORED, DEFERRED = Outcome.HANDLED, Outcome.IGNORED, Outcome.DEFERRED
PARKED, DEAD, DUPLICATE, BUSY = Outcome.PARKED, Outcome.DEAD, Outcome.DUPLICATE, Outcome.BUSY


def unlocked(*books: str) -> tuple[World, Numbered]:
    """A world with unlocked notebooks."""
    world, event = World(Notebook), Numbered()
    for book in books:
        world.deliver(event(Opened(book)), event(Stored(book, "")))
        assert world.one(book).state == "unlocked"
    return world, event


# ---------------------------------------------------------------------------- starts and duplicates


def test_two_start_events_in_one_batch_make_one_instance() -> None:
    world, event = World(Notebook), Numbered()
    assert world.deliver(event(Opened("b")), event(Opened("b"))) == [HANDLED, IGNORED]
    assert world.one("b").version == 1
    assert world.inbox == {("Notebook", "e1"): HANDLED, ("Notebook", "e2"): IGNORED}


@pytest.mark.requirement("R21")
def test_a_message_twice_in_one_batch_takes_effect_once() -> None:
    world, event = unlocked("b")
    note = event(Noted("b", "once"))
    assert world.deliver(note, note) == [HANDLED, DUPLICATE]
    assert world.deliver(*[note] * 10) == [DUPLICATE] * 10
    assert world.saga("b").notes == ["once"]
    assert world.sent_messages == ["NoteTaken"]


@pytest.mark.requirement("R21")
def test_an_ignored_message_stays_ignored() -> None:
    """Row 70 of the faults: what was ignored may not be handled by a redelivery."""
    world, event = unlocked("b")
    world.deliver(event(Sealed("b")))
    late = event(Noted("b", "late"))
    assert world.deliver(late) == [IGNORED]
    assert world.deliver(late) == [DUPLICATE]
    assert world.inbox["Notebook", late.id] is IGNORED


def test_equal_input_gives_the_same_bytes_twice() -> None:
    world, event = World(AccountGeneration), Numbered()
    batch = [
        event(AccountsNeeded("o1", "ann", ["crm", "erp"])),
        event(AccountsNeeded("o2", "bob", ["crm"])),
    ]
    loaded, known = Loaded({}, set()), Known(set(), set(), set())
    arrivals = [arrival for one in batch for arrival in world.arrivals(one)]
    first, second = (
        msgspec.json.encode(plan_batch(world.catalog, arrivals, loaded, known, START))
        for _ in range(2)
    )
    assert first == second
    assert len(first) > 1000


def test_planning_a_timeout_changes_nothing_that_was_given() -> None:
    world, event = unlocked("b")
    world.deliver(event(Reminded("b", 5)))
    (row,) = world.timeouts.values()
    arrivals = world.arrivals(row)
    known = Known(set(), {(row.uid, row.name, row.generation)}, set())
    loaded = Loaded(dict(world.instances), set())
    outcomes = [plan_batch(world.catalog, arrivals, loaded, known, row.due_at)[1] for _ in range(2)]
    assert outcomes == [[HANDLED], [HANDLED]]


# ----------------------------------------------------------------------------------- poison messages


def test_one_poison_message_in_300_delays_only_its_instance() -> None:
    """The others commit; its instance's later ones wait behind it in order and go on in order."""
    books = [f"b{n}" for n in range(30)]
    world, event = unlocked(*books)
    batch = [
        event(Noted(book, f"bad {book}" if (n, book) == (3, "b7") else f"{n}"))
        for n in range(10)
        for book in books
    ]
    outcomes = world.deliver(*batch)
    assert outcomes.count(HANDLED) == 293
    assert outcomes.count(PARKED) == 7
    assert [world.saga(book).notes for book in books if book != "b7"] == [
        [str(n) for n in range(10)]
    ] * 29
    assert world.saga("b7").notes == ["0", "1", "2"]
    reasons = [row.reason for row in world.parked.values()]
    assert reasons == ["retry"] + ["behind"] * 6
    assert "ValueError: bad b7" in next(iter(world.parked.values())).error

    world.deliver(event(Noted("b7", "10")))  # comes later still, waits too
    world.converge()
    assert world.saga("b7").notes == ["0", "1", "2", *(str(n) for n in range(4, 11))]
    (letter,) = world.dead
    assert (letter.reason, letter.attempts, letter.saga_key) == ("failed", 8, "b7")
    assert world.parked == {}


@pytest.mark.requirement("R48")
def test_gaps_between_attempts_grow() -> None:
    world, event = unlocked("b")
    world.deliver(event(Noted("b", "bad")))
    gaps = []
    while world.parked:
        (row,) = world.parked.values()
        assert row.due_at is not None
        gaps.append(row.due_at - world.now)
        world.now = row.due_at
        world.deliver(row)
    assert len(gaps) == 7
    assert all(later > earlier for earlier, later in itertools.pairwise(gaps))
    assert SECOND // 4 <= gaps[0] < SECOND // 2
    assert world.dead[0].attempts == 8


def test_gaps_stop_growing_at_the_cap() -> None:
    retry = Retry(base_us=1000, cap_us=8000)
    gaps = [retry.due_at(0, n, "m") for n in range(1, 100)]
    assert max(gaps) < 8000
    assert min(gaps[10:]) >= 4000


def test_a_message_that_works_at_last_releases_the_next_in_order() -> None:
    class Flaky(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str
        notes: list[str] = []

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Noted, when=opened)
        def note(self, event: Noted) -> None:
            if event.text == "later" and self.now.timestamp() < (START + 2 * SECOND) / SECOND:
                raise RuntimeError("not yet")
            self.notes.append(event.text)

        @on(Sealed, when=opened, goto=shut)
        def seal(self) -> None: ...

    world, event = World(Flaky), Numbered()
    world.deliver(event(Opened("b")))
    world.deliver(event(Noted("b", "later")), event(Noted("b", "1")), event(Noted("b", "2")))
    world.deliver(event(Sealed("b")))
    world.converge()
    assert world.saga("b").notes == ["later", "1", "2"]
    assert world.one("b").status is Status.COMPLETED
    assert world.dead == []


def test_what_waits_behind_is_released_when_the_instance_ends() -> None:
    """A finished instance has no queue; what waited is looked at once and ignored."""
    world, event = unlocked("b")
    world.deliver(event(Noted("b", "bad")), event(Noted("b", "1")), event(Noted("b", "2")))
    world.control(Cancel("enough"), "b")
    assert world.one("b").status is Status.COMPENSATED
    assert world.one("b").ledger.parked == ()
    world.converge()
    assert world.parked == {}
    assert world.dead == []


def test_a_start_that_fails_is_tried_again_and_then_given_up() -> None:
    class Broken(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None:
            raise LookupError("nothing there")

        @on(Sealed, when=opened, goto=shut)
        def seal(self) -> None: ...

    world, event = World(Broken), Numbered()
    assert world.deliver(event(Opened("b"))) == [PARKED]
    world.converge()
    assert world.instances == {}
    assert [letter.attempts for letter in world.dead] == [8]


def test_a_body_that_does_not_fit_is_a_dead_letter_at_once() -> None:
    world, event = unlocked("b")
    wrong = msgspec.structs.replace(event(Noted("b", "x")), body=b'{"book":"b","text":7}')
    good = event(Noted("b", "good"))
    arrivals = [*world.arrivals(good)]
    arrivals.append(msgspec.structs.replace(arrivals[0], envelope=wrong))
    loaded, known = Loaded(dict(world.instances), set()), Known(set(), set(), set())
    plan, outcomes = plan_batch(world.catalog, arrivals, loaded, known, world.now)
    assert outcomes == [HANDLED, DEAD]
    (letter,) = plan.dead_letters
    assert letter.reason == "mistyped"
    assert "Expected `str`, got `int`" in letter.error


def test_error_texts_suit_every_database() -> None:
    """No NUL, nothing that UTF-8 cannot encode."""
    world, event = unlocked("b")
    world.deliver(event(Noted("b", "bad \x00 surrogate")))
    (row,) = world.parked.values()
    assert "bad \\0 \\ud800" in row.error


def test_a_step_that_is_too_large_is_a_dead_letter_at_once() -> None:
    """Trying again would only hold up the instance."""
    world, event = World(Notebook, limits=Limits(deferred_max=2)), Numbered()
    world.deliver(event(Opened("b")))
    notes = [event(Noted("b", str(n))) for n in range(3)]
    assert world.deliver(*notes, event(Stored("b", ""))) == [DEFERRED, DEFERRED, DEAD, HANDLED]
    assert world.saga("b").notes == ["0", "1"]
    assert "2 early events wait already" in world.dead[0].error


def test_too_many_waiting_behind_are_dead_letters() -> None:
    world = World(Notebook, limits=Limits(parked_max=2))
    event = Numbered()
    world.deliver(event(Opened("b")), event(Stored("b", "")))
    batch = [event(Noted("b", text)) for text in ("bad", "1", "2")]
    assert world.deliver(*batch) == [PARKED, PARKED, DEAD]
    world.converge()
    assert world.saga("b").notes == ["1"]


# ------------------------------------------------------------------------------ early events, deferred


def test_early_events_wait_and_are_replayed_in_order() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")))
    outcomes = world.deliver(*(event(Noted("b", str(n))) for n in range(5)))
    assert outcomes == [DEFERRED] * 5
    assert world.sent == []
    assert world.deliver(event(Stored("b", ""))) == [HANDLED]
    assert world.saga("b").notes == list("01234")
    assert world.one("b").ledger.deferred == ()


def test_replay_goes_on_after_each_transition_and_ends_with_the_saga() -> None:
    """Sealed came before the notes: it ends the saga, and the notes behind it are dropped."""
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Noted("b", "1")), event(Sealed("b")))
    world.deliver(event(Noted("b", "2")), event(Stored("b", "")))
    assert world.saga("b").notes == ["1"]
    assert world.one("b").status is Status.COMPLETED


def test_an_early_event_that_fails_on_replay_holds_up_the_later_early_ones() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), *(event(Noted("b", t)) for t in ("1", "bad", "2", "3")))
    assert world.deliver(event(Stored("b", "")), event(Noted("b", "4"))) == [HANDLED, PARKED]
    assert world.saga("b").notes == ["1"]
    assert len(world.one("b").ledger.deferred) == 2
    world.converge()
    assert world.saga("b").notes == ["1", "2", "3", "4"]
    assert [letter.message_id for letter in world.dead] == ["e3"]


def test_an_early_event_that_fails_on_replay_comes_before_what_waits_behind() -> None:
    """It is older than what was parked since."""

    class Slow(Saga, key="book"):
        locked = State()
        opened = State()
        shut = State(final=True)
        book: str
        notes: list[str] = []

        def not_before(self, seconds: int) -> None:
            if self.now.timestamp() * SECOND < START + seconds * SECOND:
                raise RuntimeError("not yet")

        @on(Opened, starts=True, goto=locked)
        def begin(self) -> None: ...

        @on(Stored, when=locked, goto=opened)
        def unlock(self) -> None:
            self.not_before(1)

        @on(Noted, when=opened)
        def note(self, event: Noted) -> None:
            if event.text == "early":
                self.not_before(10)
            self.notes.append(event.text)

        @on(Sealed, when=opened, goto=shut)
        def seal(self) -> None: ...

    world, event = World(Slow), Numbered()
    world.deliver(event(Opened("b")), event(Noted("b", "early")))
    world.deliver(event(Stored("b", "")), event(Noted("b", "1")), event(Noted("b", "2")))
    assert len(world.one("b").ledger.parked) == 3
    world.converge()
    assert world.saga("b").notes == ["early", "1", "2"]
    assert world.dead == []


def test_an_early_event_that_will_never_be_handled_is_dropped() -> None:
    """It waited for a state that can no longer come."""

    class Forked(Saga, key="book"):
        start = State()
        left = State()
        right = State()
        end = State(final=True)
        book: str

        @on(Opened, starts=True, goto=start)
        def begin(self) -> None: ...

        @on(Stored, when=start, goto=(left, right))
        def choose(self, event: Stored) -> None:
            self.goto(self.left if event.text == "left" else self.right)

        @on(Noted, when=left)
        def note(self) -> None: ...

        @on(Sealed, when=(left, right), goto=end)
        def seal(self) -> None: ...

    world, event = World(Forked), Numbered()
    world.deliver(event(Opened("l")), event(Opened("r")))
    assert world.deliver(event(Noted("l")), event(Noted("r"))) == [DEFERRED, DEFERRED]
    world.deliver(event(Stored("l", "left")), event(Stored("r", "right")))
    assert [world.one(k).ledger.deferred for k in "lr"] == [(), ()]
    handlers = {k: [t.handler for t in world.transitions if t.saga_key == k] for k in "lr"}
    assert handlers["l"] == ["begin", "", "choose", "note"]
    assert handlers["r"] == ["begin", "", "choose", ""]
    assert b"not expected in state 'right'" in world.transitions[-1].effects


# ---------------------------------------------------------------------------------- missing instances


def test_an_event_before_its_instance_waits_for_it() -> None:
    world, event = World(Notebook), Numbered()
    assert world.deliver(event(Noted("b", "early"))) == [PARKED]
    (row,) = world.parked.values()
    assert (row.reason, row.lane, row.attempts) == ("missing", "book=b", 0)
    world.deliver(event(Opened("b")), event(Stored("b", "")))
    world.settle()
    assert world.saga("b").notes == ["early"]
    assert world.parked == {}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_order_within_a_batch_does_not_matter_to_an_event_before_its_instance(
    order: tuple[int, ...],
) -> None:
    world, event = World(Notebook), Numbered()
    batch = [event(Opened("b")), event(Stored("b", "")), event(Noted("b", "x"))]
    world.deliver(*(batch[n] for n in order))
    world.settle()
    assert world.saga("b").notes == ["x"]
    assert world.parked == {}


def test_an_event_whose_instance_never_comes_ends_as_a_dead_letter() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Noted("b", "lost")))
    world.converge()
    (letter,) = world.dead
    assert letter.reason == "missing"
    assert letter.error.startswith("no Notebook with book=b appeared within 6")
    assert 60 * SECOND < world.now - START < 70 * SECOND


@pytest.mark.parametrize(
    ("missing", "outcome"), [("ignore", IGNORED), ("dead-letter", DEAD), ("wait", PARKED)]
)
def test_the_policy_for_missing_instances(missing: Missing, outcome: Outcome) -> None:
    class Choosy(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Sealed, when=opened, goto=shut, missing=missing)
        def seal(self) -> None: ...

    world, event = World(Choosy), Numbered()
    assert world.deliver(event(Sealed("b"))) == [outcome]
    assert len(world.parked) == (outcome is PARKED)
    assert [letter.error for letter in world.dead] == (
        ["no Choosy with book=b"] if outcome is DEAD else []
    )


# ----------------------------------------------------------------------------------- fan-out by shared key


def three_orders() -> tuple[World, Numbered]:
    world, event = World(AccountGeneration, messages=[AccountCreated]), Numbered()
    world.deliver(*(event(AccountsNeeded(f"o{n}", "ann", ["crm"])) for n in (1, 2, 3)))
    return world, event


def states(world: World) -> dict[str, str]:
    return {key: instance.state for (_, key), instance in sorted(world.instances.items())}


def test_one_event_reaches_every_instance_with_its_key() -> None:
    world, event = three_orders()
    confirmed = event(EmailConfirmed("ann"))
    assert world.deliver(confirmed) == [HANDLED] * 3
    assert set(states(world).values()) == {"creating"}
    assert len({command.id for command in world.sent}) == 3
    assert world.deliver(confirmed) == [DUPLICATE] * 3


def test_a_busy_instance_is_reached_later_and_the_others_only_once() -> None:
    world, event = three_orders()
    confirmed = event(EmailConfirmed("ann"))
    world.busy = {("AccountGeneration", "o2")}
    assert world.deliver(confirmed) == [HANDLED, BUSY, HANDLED]
    assert states(world) == {"o1": "creating", "o2": "waiting", "o3": "creating"}
    world.busy = set()
    assert world.deliver(confirmed) == [DUPLICATE, HANDLED, DUPLICATE]
    assert len(world.sent) == 3


def test_a_busy_instance_is_not_forgotten_for_one_that_began_in_the_same_batch() -> None:
    world, event = three_orders()
    confirmed = event(EmailConfirmed("ann"))
    world.busy = {("AccountGeneration", f"o{n}") for n in (1, 2, 3)}
    outcomes = world.deliver(event(AccountsNeeded("o4", "ann", ["crm"])), confirmed)
    assert outcomes == [HANDLED, BUSY, BUSY, BUSY]
    assert states(world)["o4"] == "creating"
    world.busy = set()
    assert world.deliver(confirmed) == [HANDLED, HANDLED, HANDLED, DUPLICATE]
    assert len(world.sent) == 4


def test_a_parked_event_reaches_all_or_none_of_its_instances() -> None:
    """The row is one; it may not be taken over while one of its instances is held."""
    world, event = World(AccountGeneration), Numbered()
    assert world.deliver(event(EmailConfirmed("ann"))) == [PARKED]
    world.deliver(*(event(AccountsNeeded(f"o{n}", "ann", [])) for n in (1, 2)))
    world.busy = {("AccountGeneration", "o2")}
    (row,) = world.parked.values()
    assert world.deliver(row) == [BUSY, BUSY]
    world.busy = set()
    assert world.deliver(row) == [HANDLED, HANDLED]
    assert world.parked == {}


@pytest.mark.requirement("R21")
def test_a_redelivery_does_not_meet_again_the_instance_that_a_parked_copy_reached() -> None:
    """Nobody had the key when it came; then it was handled from SQL; then the bus sends it again."""
    world, event = World(AccountGeneration), Numbered()
    confirmed = event(EmailConfirmed("ann"))
    world.deliver(confirmed)
    world.deliver(event(AccountsNeeded("o1", "ann", ["crm"])))
    world.settle()
    assert len(world.sent) == 1
    assert world.deliver(confirmed) == [DUPLICATE]
    assert len(world.sent) == 1


@pytest.mark.requirement("R21")
def test_two_copies_of_which_one_found_nobody_meet_an_instance_once() -> None:
    """Two workers at a time: one looked before the instance was there, the other after."""
    world, event = World(AccountGeneration), Numbered()
    confirmed = event(EmailConfirmed("ann"))
    world.deliver(confirmed)
    (early,) = world.parked.values()
    del world.inbox["AccountGeneration", confirmed.id]  # not yet to be seen by the other worker
    world.deliver(event(AccountsNeeded("o1", "ann", ["crm"])))
    assert world.deliver(confirmed) == [HANDLED]
    world.inbox["AccountGeneration", confirmed.id] = PARKED
    assert world.deliver(early) == [DUPLICATE]
    assert len(world.sent) == 1
    assert world.parked == {}


@pytest.mark.requirement("R21")
def test_what_was_ignored_because_nobody_had_the_key_stays_ignored() -> None:
    class Deaf(Saga, key="order_ref"):
        waiting = State()
        over = State(final=True)
        order_ref: str

        @on(AccountsNeeded, starts=True, goto=waiting)
        def begin(self, event: AccountsNeeded) -> None:
            self.correlate("user_ref", event.user_ref)

        @on(EmailConfirmed, key="user_ref", when=waiting, goto=over, missing="ignore")
        def end(self) -> None: ...

    world, event = World(Deaf), Numbered()
    confirmed = event(EmailConfirmed("ann"))
    assert world.deliver(confirmed) == [IGNORED]
    world.deliver(event(AccountsNeeded("o1", "ann", [])))
    assert world.deliver(confirmed) == [DUPLICATE]
    assert states(world) == {"o1": "waiting"}


def test_a_parked_message_of_several_keys_comes_back_to_its_own_instance_only() -> None:
    """Its other instances have had it."""

    class Letter(Event, topic="notes"):
        books: list[str]

    class Box(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str
        count: int = 0

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Letter, field="books", when=opened)
        def letter(self) -> None:
            self.count += 1

        @on(Sealed, when=opened, goto=shut)
        def seal(self) -> None: ...

    world, event = World(Box), Numbered()
    world.deliver(event(Opened("a")))
    world.deliver(event(Letter(["a", "b"])))
    world.deliver(event(Opened("b")))
    world.settle()
    assert [world.saga(key).count for key in "ab"] == [1, 1]


def test_a_redelivery_after_its_only_instance_ended_is_no_dead_letter() -> None:
    """The key is free by then, so that nobody is found: the message has been handled all the same."""

    class Once(Saga, key="order_ref"):
        waiting = State()
        over = State(final=True)
        order_ref: str

        @on(AccountsNeeded, starts=True, goto=waiting)
        def begin(self, event: AccountsNeeded) -> None:
            self.correlate("user_ref", event.user_ref)

        @on(EmailConfirmed, key="user_ref", when=waiting, goto=over)
        def end(self) -> None: ...

    world, event = World(Once), Numbered()
    world.deliver(event(AccountsNeeded("o1", "ann", [])))
    confirmed = event(EmailConfirmed("ann"))
    assert world.deliver(confirmed) == [HANDLED]
    assert world.correlations == {}
    assert world.deliver(confirmed) == [DUPLICATE]
    world.converge()
    assert world.dead == []


def test_a_failure_at_one_instance_leaves_the_others_alone() -> None:
    class Picky(Saga, key="order_ref"):
        waiting = State()
        over = State(final=True)
        order_ref: str

        @on(AccountsNeeded, starts=True, goto=waiting)
        def begin(self, event: AccountsNeeded) -> None:
            self.correlate("user_ref", event.user_ref)

        @on(EmailConfirmed, key="user_ref", when=waiting, goto=over)
        def end(self) -> None:
            if self.order_ref == "o2" and self.now.timestamp() * SECOND < START + SECOND:
                raise ValueError("not o2")

    world, event = World(Picky), Numbered()
    confirmed = event(EmailConfirmed("ann"))
    world.deliver(confirmed)  # nobody there: parked
    world.deliver(*(event(AccountsNeeded(f"o{n}", "ann", [])) for n in (1, 2, 3)))
    world.settle()
    assert states(world) == {"o1": "over", "o2": "waiting", "o3": "over"}
    assert world.deliver(confirmed) == [DUPLICATE]
    world.converge()
    assert states(world) == dict.fromkeys(("o1", "o2", "o3"), "over")
    assert world.dead == []


def test_one_event_names_several_instances_itself() -> None:
    class Listed(Event, topic="notes"):
        books: list[str]

    class Reader(Saga, key="book"):
        opened = State()
        read = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Listed, field="books", when=opened, goto=read)
        def seen(self) -> None: ...

    world, event = World(Reader), Numbered()
    world.deliver(event(Opened("a")), event(Opened("c")))
    listed = event(Listed(["a", "b", "c", "a"]))
    assert world.deliver(listed) == [HANDLED, PARKED, HANDLED]
    (row,) = world.parked.values()
    assert row.lane == "book=b"
    world.deliver(event(Opened("b")))
    assert row.due_at is not None
    assert world.due(), "the start of b wakes it"
    world.settle()
    assert states(world) == {"a": "read", "b": "read", "c": "read"}
    assert world.deliver(listed) == [DUPLICATE] * 3
    assert [t.saga_key for t in world.transitions].count("a") == 2


def test_a_unique_key_belongs_to_one_instance() -> None:
    class Exclusive(Saga, key="order_ref"):
        waiting = State()
        over = State(final=True)
        order_ref: str

        @on(AccountsNeeded, starts=True, goto=waiting)
        def begin(self, event: AccountsNeeded) -> None:
            self.correlate("user_ref", event.user_ref, unique=True)

        @on(EmailConfirmed, key="user_ref", when=waiting, goto=over)
        def end(self) -> None: ...

    world, event = World(Exclusive), Numbered()
    first, second = (event(AccountsNeeded(f"o{n}", "ann", [])) for n in (1, 2))
    assert world.deliver(first, second) == [HANDLED, PARKED]
    (row,) = world.parked.values()
    assert "unique and belongs to instance 'o1'" in row.error
    third = event(AccountsNeeded("o3", "ann", []))
    world.deliver(event(EmailConfirmed("ann")), third)  # o1 ends, and its key is free
    assert states(world) == {"o1": "over", "o3": "waiting"}
    world.deliver(event(EmailConfirmed("ann")))
    world.converge()
    assert states(world) == {"o1": "over", "o2": "waiting", "o3": "over"}


# --------------------------------------------------------------------------------------- timeouts


def test_a_timeout_fires_once_and_only_the_latest_setting_counts() -> None:
    world, event = unlocked("b")
    world.deliver(event(Reminded("b", 10)))
    (old,) = world.timeouts.values()
    world.deliver(event(Reminded("b", 20)))
    (new,) = world.timeouts.values()
    assert new.due_at - old.due_at == 10 * SECOND
    assert new.generation > old.generation
    world.advance(10)
    assert world.deliver(old) == [DUPLICATE]
    assert world.saga("b").reminders == 0
    world.advance(10)
    assert world.saga("b").reminders == 1
    assert world.deliver(new) == [DUPLICATE]


@pytest.mark.parametrize("timeout_first", [True, False])
def test_timeout_and_new_setting_in_one_batch(timeout_first: bool) -> None:
    world, event = unlocked("b")
    world.deliver(event(Reminded("b", 10)))
    (row,) = world.timeouts.values()
    world.now = row.due_at
    again = event(Reminded("b", 10))
    outcomes = world.deliver(*((row, again) if timeout_first else (again, row)))
    assert outcomes == ([HANDLED, HANDLED] if timeout_first else [HANDLED, IGNORED])
    assert world.saga("b").reminders == timeout_first
    world.advance(10)
    assert world.saga("b").reminders == 1 + timeout_first


def test_an_early_timeout_waits_for_its_state() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Reminded("b", 5)))
    world.advance(6)
    assert [e.type for e in world.one("b").ledger.deferred] == ["sagacity.TimeoutDue"]
    world.deliver(event(Stored("b", "")))
    assert world.saga("b").reminders == 1
    assert world.one("b").ledger.timeouts == {}


def test_an_early_timeout_that_is_set_anew_is_stale() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Reminded("b", 5)))
    world.advance(6)
    world.deliver(event(Reminded("b", 5)), event(Stored("b", "")))
    assert world.saga("b").reminders == 0
    world.advance(6)
    assert world.saga("b").reminders == 1


def test_the_end_disarms_every_timeout() -> None:
    world, event = unlocked("b")
    world.deliver(event(Reminded("b", 10)))
    (row,) = world.timeouts.values()
    world.deliver(event(Sealed("b")))
    assert world.timeouts == {}
    world.timeouts[row.uid, row.name] = row  # read by another worker before the end was committed
    world.now = row.due_at
    assert world.deliver(row) == [IGNORED]
    assert world.saga("b").reminders == 0


def test_a_timeout_set_and_cancelled_in_the_batch_that_starts_leaves_no_row() -> None:
    world, event = World(Notebook), Numbered()
    world.deliver(event(Opened("b")), event(Stored("b", "")))
    assert world.timeouts == {}


def test_a_step_may_cancel_a_timeout_and_set_it_anew() -> None:
    class Renewed(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        @on(Noted, when=opened)
        def renew(self) -> None:
            self.cancel_timeout("end")
            self.set_timeout("end", after=timedelta(seconds=10))

        @on_timeout("end", when=opened, goto=shut)
        def end(self) -> None: ...

    world, event = World(Renewed), Numbered()
    world.deliver(event(Opened("b")))
    world.advance(9)
    world.deliver(event(Noted("b")))
    world.advance(9)
    assert world.one("b").state == "opened"
    world.advance(1)
    assert world.one("b").state == "shut"


def test_a_timeout_whose_handler_fails_is_tried_again() -> None:
    class Failing(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None:
            self.set_timeout("end", after=timedelta(seconds=1))

        @on_timeout("end", when=opened, goto=shut)
        def end(self) -> None:
            if self.now.timestamp() * SECOND < START + 3 * SECOND:
                raise RuntimeError("not yet")

    world, event = World(Failing), Numbered()
    world.deliver(event(Opened("b")))
    world.advance(1)
    (row,) = world.parked.values()
    assert (row.reason, row.message_id[:8], world.timeouts) == ("retry", "timeout:", {})
    world.converge()
    assert world.one("b").state == "shut"


# ------------------------------------------------------------------------- the same in other batches


@pytest.mark.requirement("R62")
@pytest.mark.parametrize("batched", [True, False])
def test_all_orders_of_the_facts_give_the_same_commands(batched: bool) -> None:
    seen = set()
    for order in itertools.permutations([Asked("c"), Paid("c"), Packed("c"), Checked("c")]):
        world, event = World(Shipping), Numbered()
        envelopes = [event(fact) for fact in order]
        if batched:
            world.deliver(*envelopes)
        else:
            for envelope in envelopes:
                world.deliver(envelope)
        world.settle()
        assert world.one("c").status is Status.COMPLETED
        seen.add(tuple((e.type, e.body) for e in world.sent))
    assert seen == {(("shipping.Ship", b'{"facts":["Checked","Packed","Paid"]}'),)}


@pytest.mark.requirement("R5")
def test_a_failed_command_is_an_event_in_the_history() -> None:
    world, event = World(Trip), Numbered()
    world.deliver(event(TripRequested("t")))
    world.deliver(failed(world.sent[1], "no rooms", refused=True))
    last = world.transitions[-1]
    assert last.message_type == "sagacity.CommandFailed"
    assert b"no rooms" in last.effects


def test_replies_find_their_instance_by_header() -> None:
    world, event = three_orders()
    world.deliver(event(EmailConfirmed("ann")))
    command = next(e for e in world.sent if e.saga_key == "o2")
    assert world.deliver(reply_to(command, AccountCreated("crm"))) == [HANDLED]
    assert states(world) == {"o1": "creating", "o2": "ready", "o3": "creating"}


def test_a_reply_to_nobody_is_ignored() -> None:
    world, event = three_orders()
    stray = envelope_of(
        AccountCreated("crm"), "r", saga_type="AccountGeneration", saga_key="o9", saga_uid="u"
    )
    assert world.deliver(stray, event(EmailConfirmed("ann"))) == [IGNORED] + [HANDLED] * 3


def test_a_plan_says_when_it_is_empty() -> None:
    world, event = unlocked("b")
    world.busy = {("Notebook", "b")}
    world.deliver(event(Noted("b", "x")))
    assert world.plans[-1].empty
    assert not world.plans[0].empty
    assert world.plans[0].lanes == set()
    world.busy = set()
    world.deliver(event(Noted("b", "x")))
    assert world.plans[-1].lanes == {world.one("b").uid}
