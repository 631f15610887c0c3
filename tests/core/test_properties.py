"""What holds for every sequence of messages, however it is cut into batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagacity.core.decide import Cancel, RetryUndo, replay
from sagacity.core.delivery import Envelope
from sagacity.core.instance import Instance, Status
from sagacity.core.messages import Event
from sagacity.core.saga import Saga
from tests.core.driver import World, done, envelope_of, failed, reply_to
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
    ParallelTrip,
    Reminded,
    Sealed,
    Shipping,
    Stored,
    Trip,
    TripChanged,
    TripRequested,
)

SAGAS: tuple[type[Saga], ...] = (Notebook, AccountGeneration)
MESSAGES = [AccountCreated]

books = st.sampled_from(["a", "b"])
texts = st.sampled_from(["1", "2", "3", "bad"])
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Noted, books, texts),
    st.builds(Stored, books, st.just("")),
    st.builds(Reminded, books, st.integers(0, 100)),
    st.builds(Opened, books),
    st.builds(EmailConfirmed, st.sampled_from(["ann", "bob"])),
    st.builds(Sealed, books),
)
sequences = st.lists(st.tuples(events, st.integers(0, 12)), max_size=25)
cuts = st.lists(st.integers(1, 8), min_size=1, max_size=12)

STARTS: list[Event] = [
    Opened("a"),
    Opened("b"),
    AccountsNeeded("o1", "ann", ["crm", "erp"]),
    AccountsNeeded("o2", "ann", ["crm"]),
    AccountsNeeded("o3", "bob", []),
]


def envelopes(sequence: Sequence[tuple[Event, int]]) -> list[Envelope]:
    """Messages with ids; a small number stands for a copy of an earlier one."""
    made: list[Envelope] = []
    for number, (event, copy_of) in enumerate(sequence):
        if copy_of < len(made) and copy_of < 3:
            made.append(made[copy_of])
        else:
            made.append(envelope_of(event, f"e{number}"))
    return made


def batches(messages: Sequence[Envelope], sizes: Sequence[int]) -> Iterator[Sequence[Envelope]]:
    left = list(messages)
    for size in itertools.cycle(sizes):
        if not left:
            return
        yield left[:size]
        left = left[size:]


def started(sagas: Sequence[type[Saga]], first: Sequence[Event]) -> World:
    world = World(*sagas, messages=MESSAGES)
    for number, event in enumerate(first):
        world.deliver(envelope_of(event, f"s{number}"))
    return world


def lanes(world: World) -> dict[str, list[Envelope]]:
    found: dict[str, list[Envelope]] = {}
    for lane, envelope in world.outbox:
        found.setdefault(lane, []).append(envelope)
    return found


def run(sequence: Sequence[tuple[Event, int]], sizes: Sequence[int]) -> World:
    world = started(SAGAS, STARTS)
    for batch in batches(envelopes(sequence), sizes):
        world.deliver(*batch)
    world.converge()
    world.advance(50)
    return world


@settings(max_examples=150, deadline=None)
@given(sequences, cuts)
def test_no_result_depends_on_which_messages_share_a_batch(
    sequence: list[tuple[Event, int]], sizes: list[int]
) -> None:
    """G3: instances and what they send are the same, one message at a time or many."""
    single, many = run(sequence, [1]), run(sequence, sizes)
    assert many.instances == single.instances
    assert lanes(many) == lanes(single)
    assert many.inbox.keys() == single.inbox.keys()
    assert {(d.consumer, d.message_id) for d in many.dead} == {
        (d.consumer, d.message_id) for d in single.dead
    }


facts = st.sampled_from([Asked, Paid, Packed, Checked])
unsorted_facts = st.lists(
    st.tuples(st.builds(lambda cls, case: cls(case), facts, books), st.integers(0, 12)), max_size=20
)


@settings(max_examples=100, deadline=None)
@given(unsorted_facts, cuts)
def test_events_before_their_instance_are_the_same_in_any_batch(
    sequence: list[tuple[Event, int]], sizes: list[int]
) -> None:
    """G3 for messages that find no instance yet; `Shipping` does not care for their order."""
    results = []
    for cut in ([1], sizes):
        world = World(Shipping)
        for batch in batches(envelopes(sequence), cut):
            world.deliver(*batch)
        world.settle()
        commands = sorted((e.saga_key, e.type, e.body) for e in world.sent)
        # Who came first gives the instance its uid, and so what follows its ids.
        states = {place: (i.state, i.status, i.data) for place, i in world.instances.items()}
        results.append((commands, states))
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------- history


def replayed(world: World, instance: Instance) -> Instance | None:
    definition = world.definitions[instance.type]
    rows = [
        t for t in world.transitions if (t.saga_type, t.saga_key) == (instance.type, instance.key)
    ]
    rows.sort(key=lambda row: row.version)
    history = [
        (row.version, row.at, msgspec.msgpack.decode(row.entry, type=Envelope)) for row in rows
    ]
    return replay(definition, instance.key, history, world.decode, world.catalog.sender)


def without_queue(instance: Instance | None, waiting: bool = True) -> Instance | None:
    """The instance without what a history does not tell: its queue, and versions spent on it."""
    if instance is None:
        return None
    ledger = msgspec.structs.replace(instance.ledger, parked=())
    if not waiting:
        ledger = msgspec.structs.replace(ledger, deferred=())
    return msgspec.structs.replace(instance, ledger=ledger, version=0)


@pytest.mark.requirement("R39")
@settings(max_examples=150, deadline=None)
@given(sequences, cuts)
def test_replaying_the_history_gives_the_same_instance(
    sequence: list[tuple[Event, int]], sizes: list[int]
) -> None:
    """I2: the state is the fold of what was recorded, no duplicates, no gaps."""
    world = run(sequence, sizes)
    sent = len(world.sent)
    for instance in world.instances.values():
        # An early message that failed for good left the instance without a transition.
        poison = any(letter.saga_key == instance.key for letter in world.dead)
        again = replayed(world, instance)
        assert without_queue(again, not poison) == without_queue(instance, not poison)
        versions = [t.version for t in world.transitions if t.uid == instance.uid]
        assert versions == sorted(set(versions))
        assert versions[-1] <= instance.version
    assert len(world.sent) == sent


# ------------------------------------------------------------------------------------ compensation

answers = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["done", "failed", "refused", "cancel", "event"])),
    max_size=10,
)
ANSWERS: dict[str, Callable[[Envelope], Envelope]] = {
    "done": done,
    "failed": failed,
    "refused": lambda command: failed(command, refused=True),
    "event": lambda command: envelope_of(TripChanged("t"), f"changed:{command.id}"),
}


@pytest.mark.requirement("R7")
@pytest.mark.requirement("R65")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(answers, st.lists(st.sampled_from(["done", "failed"]), max_size=6), st.booleans())
def test_every_trip_ends_and_what_was_issued_and_not_refused_is_undone(
    first: list[tuple[int, str]], undone: list[str], parallel: bool
) -> None:
    """G9: for every command issued and not positively refused its undo is confirmed, newest first."""
    world = started([ParallelTrip if parallel else Trip], [TripRequested("t")])
    commands = list(world.sent)
    refused: set[str] = set()
    for number, kind in first:
        command = commands[number % len(commands)]
        running = command.id in world.one("t").ledger.pending
        if kind == "cancel":
            world.control(Cancel("stop"), "t")
            continue
        if kind == "refused" and running and not world.one("t").status.finished:
            refused.add(command.id)
        world.deliver(msgspec.structs.replace(ANSWERS[kind](command), id=f"{kind}:{command.id}"))
    if world.one("t").status is Status.RUNNING:
        for command in commands:
            world.deliver(done(command))
    outcomes = itertools.chain(undone, itertools.repeat("done"))
    confirmed: list[str] = []
    for _ in range(50):
        instance = world.one("t")
        if instance.status.finished:
            break
        if instance.status is Status.STUCK:
            world.control(RetryUndo("again"), "t")
            continue
        under_way = [e for e in world.sent if e.undoes and e.id in instance.ledger.pending]
        outcome = next(outcomes)
        world.deliver(ANSWERS[outcome](under_way[0]))
        if outcome == "done":
            confirmed.append(under_way[0].undoes)
    instance = world.one("t")
    if instance.status is Status.COMPLETED:
        assert not [e for e in world.sent if e.undoes]
        return
    assert instance.status is Status.COMPENSATED
    issued = [c.id for c in commands if c.type == "bookings.Book"]
    assert len(set(confirmed)) == len(confirmed)
    assert set(issued) - refused <= set(confirmed) <= set(issued)
    if not parallel:
        assert confirmed == [c for c in reversed(issued) if c in confirmed]
    assert without_queue(replayed(world, instance)) == without_queue(instance)


# -------------------------------------------------------------------------------- any order of facts


@pytest.mark.requirement("R62")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_orders_of_answers_lead_to_the_same_end(count: int) -> None:
    ends = set()
    for order in itertools.permutations(range(count)):
        systems = [f"s{n}" for n in range(count)]
        world = started([AccountGeneration], [AccountsNeeded("o", "ann", systems)])
        world.deliver(envelope_of(EmailConfirmed("ann"), "c"))
        commands = list(world.sent)
        assert len(commands) == count
        for number in order:
            world.deliver(reply_to(commands[number], AccountCreated(systems[number])))
        saga = world.saga("o")
        ends.add((world.one("o").state, *sorted(saga.created)))
        assert saga.created == [systems[n] for n in order]
    assert ends == {("ready", *[f"s{n}" for n in range(count)])}
