"""Which inputs may be in batches at the same time, and in which order they get there."""

from hypothesis import given
from hypothesis import strategies as st

from sagacity import Event, Saga, Service, State, on
from sagacity.core.delivery import Delivery, enveloped
from sagacity.core.plan import ParkedRow
from sagacity.ports import DueTimeout
from sagacity.worker.intake import ALONE_FROM, Intake, Taken
from sagacity.worker.sorting import Sorted, sorted_input


class Opened(Event, topic="intake"):
    ref: str


class Moved(Event, topic="intake"):
    refs: list[str]


class Paid(Event, topic="intake"):
    receipt: str


class Case(Saga, key="ref"):
    opened = State()
    closed = State(final=True)

    ref: str

    @on(Opened, starts=True, goto=opened)
    def begin(self) -> None:
        self.correlate("receipt", f"r-{self.ref}")

    @on(Moved, when=opened, field="refs")
    def move(self) -> None: ...

    @on(Paid, when=opened, goto=closed, key="receipt", field="receipt")
    def pay(self) -> None: ...


service = Service("intake", sagas=[Case])
catalog = service.catalog()


def delivered(event: Event, number: int, *, attempt: int = 1) -> Sorted:
    envelope = enveloped(event, message_id=f"m{number}", time=0)
    return sorted_input(
        service,
        catalog,
        Delivery(topic="intake", entry_id=f"{number}-0", envelope=envelope, attempt=attempt),
    )


def entry_of(one: Sorted) -> str:
    assert isinstance(one.input, Delivery)
    return one.input.entry_id


def entries(batch: Taken | None) -> list[str]:
    return [] if batch is None else [entry_of(one) for one in batch.inputs]


def opened(*refs: str) -> list[Sorted]:
    return [delivered(Opened(ref), number) for number, ref in enumerate(refs)]


def test_a_batch_takes_what_is_there_in_order() -> None:
    intake = Intake()
    intake.add(opened("a", "b", "a", "c"))
    assert entries(intake.take(3)) == ["0-0", "1-0", "2-0"]
    assert entries(intake.take(3)) == ["3-0"]
    assert intake.take(3) is None


def test_an_instance_under_way_holds_up_its_own_messages_only() -> None:
    intake = Intake()
    intake.add(opened("a"))
    first = intake.take(10)
    assert first is not None
    intake.add([delivered(Opened("a"), 1), delivered(Opened("b"), 2), delivered(Opened("a"), 3)])
    assert entries(intake.take(10)) == ["2-0"]
    assert intake.take(10) is None
    intake.done(first)
    assert entries(intake.take(10)) == ["1-0", "3-0"]


def test_what_waits_behind_one_instance_waits_at_all_its_instances() -> None:
    intake = Intake()
    intake.add(opened("a"))
    first = intake.take(10)
    assert first is not None
    intake.add([delivered(Moved(["a", "b"]), 1), delivered(Opened("b"), 2)])
    assert intake.take(10) is None, "o b came after the move of a and b"
    intake.done(first)
    assert entries(intake.take(10)) == ["1-0", "2-0"]


def test_who_is_looked_up_by_the_database_runs_beside_nobody() -> None:
    intake = Intake()
    intake.add(opened("a"))
    first = intake.take(10)
    assert first is not None
    intake.add([delivered(Opened("b"), 1), delivered(Paid("r-x"), 2), delivered(Opened("c"), 3)])
    beside = intake.take(10)
    assert entries(beside) == ["1-0"]
    assert beside is not None
    intake.done(first)
    assert intake.take(10) is None
    intake.done(beside)
    alone = intake.take(10)
    assert entries(alone) == ["2-0", "3-0"]
    intake.add([delivered(Opened("d"), 4)])
    assert intake.take(10) is None
    assert alone is not None
    intake.done(alone)
    assert entries(intake.take(10)) == ["4-0"]


def test_a_suspect_runs_in_a_batch_of_its_own_beside_nobody() -> None:
    intake = Intake()
    intake.add(
        [
            delivered(Opened("a"), 0),
            delivered(Opened("b"), 1, attempt=ALONE_FROM),
            delivered(Opened("c"), 2),
        ]
    )
    first = intake.take(10)
    assert first is not None
    assert (entries(first), first.alone) == (["0-0"], False)
    assert intake.take(10) is None
    intake.done(first)
    suspect = intake.take(10)
    assert suspect is not None
    assert (entries(suspect), suspect.alone) == (["1-0"], True)
    assert intake.take(10) is None
    intake.done(suspect)
    assert entries(intake.take(10)) == ["2-0"]


def test_what_another_worker_held_goes_first() -> None:
    intake = Intake()
    intake.add(opened("a", "b"))
    first = intake.take(2)
    assert first is not None
    intake.add([delivered(Opened("a"), 2)])
    intake.done(first, again=[first.inputs[0]])
    assert entries(intake.take(10)) == ["0-0", "2-0"]


def test_an_entry_that_is_here_is_not_taken_twice() -> None:
    intake = Intake()
    intake.add(opened("a"))
    first = intake.take(10)
    assert first is not None
    intake.add(opened("a"))
    assert intake.held == 1
    intake.done(first, again=first.inputs)
    intake.add(opened("a"))
    assert intake.held == 1
    again = intake.take(10)
    assert again is not None
    intake.done(again)
    intake.add(opened("a"))
    assert entries(intake.take(10)) == ["0-0"]


def test_timeouts_and_parked_rows_wait_for_their_instance() -> None:
    intake = Intake()
    intake.add(opened("a"))
    first = intake.take(10)
    assert first is not None
    envelope = enveloped(Opened("a"), message_id="p", time=0)
    row = ParkedRow(
        consumer="Case",
        message_id="p",
        saga_type="Case",
        saga_key="a",
        due_at=0,
        attempts=1,
        parked_at=0,
        reason="retry",
        envelope=envelope,
    )
    timeout = DueTimeout(
        uid="u", name="late", generation=1, due_at=0, saga_type="Case", saga_key="a"
    )
    intake.add([sorted_input(service, catalog, row), sorted_input(service, catalog, timeout)])
    assert intake.take(10) is None
    intake.done(first)
    both = intake.take(10)
    assert both is not None
    assert [one.input for one in both.inputs] == [row, timeout]


REFS = st.sampled_from("abcd")
EVENTS = st.one_of(
    REFS.map(Opened),
    st.lists(REFS, min_size=1, max_size=3).map(Moved),
    REFS.map(Paid),
)


@given(
    came=st.lists(st.tuples(EVENTS, st.sampled_from([1, 1, 1, ALONE_FROM])), max_size=25),
    limit=st.integers(1, 5),
    slots=st.integers(1, 3),
    turns=st.lists(st.integers(0, 5), min_size=200, max_size=200),
)
def test_whatever_comes(
    came: list[tuple[Event, int]], limit: int, slots: int, turns: list[int]
) -> None:
    intake = Intake()
    waiting = [delivered(event, n, attempt=a) for n, (event, a) in enumerate(came)]
    running: list[Taken] = []
    taken: list[Sorted] = []
    for turn in turns:
        if turn == 0 and waiting:
            intake.add([waiting.pop(0)])
        elif turn == 1 and running:
            intake.done(running.pop(0))
        elif turn == 2 and running:
            intake.done(running.pop())
        elif len(running) < slots and (batch := intake.take(limit)) is not None:
            assert 0 < len(batch.inputs) <= limit
            places = batch.touches
            for other in running:
                assert places.isdisjoint(other.touches)
                assert not other.exclusive
            assert not (batch.exclusive and running)
            running.append(batch)
            taken += batch.inputs
    intake.add(waiting)
    for batch in running:
        intake.done(batch)
    while (last := intake.take(limit)) is not None:
        taken += last.inputs
        intake.done(last)
    assert len(intake) == intake.held == 0
    assert sorted(map(entry_of, taken)) == sorted(f"{n}-0" for n in range(len(came)))
    for ref in "abcd":
        mine = [int(entry_of(one)[:-2]) for one in taken if ("Case", ref) in (one.touches or ())]
        assert mine == sorted(mine), f"messages of {ref} went out of order"
