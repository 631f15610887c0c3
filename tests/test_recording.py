"""Entities record events: pure, inspectable, and with no way to reach a bus."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest

from sagacity import recording
from sagacity.core.delivery import HOPS_MAX, Envelope
from sagacity.core.errors import DefinitionError, NotRecordable
from sagacity.core.messages import Command, Event
from sagacity.recording import (
    Mode,
    Origin,
    RecordsEvents,
    Subscriber,
    current_origin,
    envelope_of,
    external_effects,
    originating,
    pending,
    recorded,
    recording_time,
)


class OrderShipped(Event, topic="orders"):
    order_ref: str
    boxes: int = 1


class OrderPaid(Event, topic="orders"):
    order_ref: str


class Anything(Event, topic="orders"):
    payload: Any


class ShipOrder(Command, topic="orders"):
    order_ref: str


class Plain(RecordsEvents):
    def __init__(self, order_ref: str) -> None:
        self.id = order_ref

    def ship(self) -> None:
        self.record(OrderShipped(self.id))


@dataclass
class Open(RecordsEvents):
    id: str
    lines: list[str] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Tight(RecordsEvents):
    id: str


class Alias(RecordsEvents):
    def event_subject(self) -> str:
        return "Account/7"


def noted(entity: RecordsEvents) -> list[Event]:
    return list(entity.pending_events)


def entities() -> list[RecordsEvents]:
    return [Plain("o1"), Open("o1"), Tight("o1"), Plain.__new__(Plain)]


# --- recording -----------------------------------------------------------------------------------


@pytest.mark.requirement("R18", "R44")
@pytest.mark.parametrize("entity", entities(), ids=["plain", "dataclass", "slots", "no-init"])
def test_any_class_records_and_shows_what_is_pending(entity: RecordsEvents) -> None:
    assert noted(entity) == []
    entity.record(OrderShipped("o1"))
    entity.record(OrderPaid("o1"))
    assert noted(entity) == [OrderShipped("o1"), OrderPaid("o1")]
    assert noted(entity) == [OrderShipped("o1"), OrderPaid("o1")], "reading drains nothing"


@pytest.mark.requirement("R18")
def test_draining_empties_the_entity() -> None:
    order = Plain("o1")
    order.ship()
    assert [item.event for item in order.drain_events()] == [OrderShipped("o1")]
    assert order.drain_events() == ()
    assert noted(order) == []


@pytest.mark.requirement("R28", "R44")
def test_an_entity_has_no_way_to_publish() -> None:
    public = {name for name in dir(RecordsEvents) if not name.startswith("_")}
    assert public == {
        "record",
        "pending_events",
        "cancel_events",
        "drain_events",
        "event_subject",
    }
    imported = {
        getattr(value, "__module__", "") or getattr(value, "__name__", "")
        for value in vars(recording).values()
    }
    assert not [name for name in imported if "ports" in name or "backends" in name]


@pytest.mark.requirement("R51")
def test_the_event_is_fixed_at_the_moment_of_recording() -> None:
    lines = ["a"]
    order = Open("o1")
    order.record(Anything(lines))
    lines.append("b")
    assert pending(order)[0].body == b'{"payload":["a"]}'


@pytest.mark.requirement("R22", "R51")
@pytest.mark.parametrize(
    "payload",
    [
        Plain("o1"),
        Open("o1"),
        Tight("o1"),
        [{"order": Open("o1")}],
        ({1: (Open("o1"),)},),
    ],
)
def test_a_payload_with_an_entity_is_refused_at_once(payload: object) -> None:
    order = Plain("o1")
    with pytest.raises(NotRecordable) as refusal:
        order.record(Anything(payload))
    assert "put the entity's id" in str(refusal.value)
    assert noted(order) == []


@pytest.mark.requirement("R51")
def test_a_payload_that_refers_to_itself_is_refused() -> None:
    loop: list[object] = []
    loop += [loop, loop]
    with pytest.raises(NotRecordable):
        Plain("o1").record(Anything(loop))


@pytest.mark.requirement("R51")
def test_values_that_no_consumer_could_read_are_refused() -> None:
    with pytest.raises(NotRecordable) as refusal:
        Plain("o1").record(OrderShipped("o1", boxes="three"))  # type: ignore[arg-type]
    assert "Expected `int`, got `str`" in str(refusal.value)
    assert "test_recording.py" in str(refusal.value)


@pytest.mark.parametrize("what", [ShipOrder("o1"), "shipped", None, OrderShipped])
def test_only_events_are_recorded(what: Any) -> None:
    order = Plain("o1")
    with pytest.raises(NotRecordable, match="expected an Event"):
        order.record(what)
    assert noted(order) == []


def test_copies_of_an_entity_start_empty() -> None:
    order = Plain("o1")
    order.ship()
    for twin in (copy.copy(order), copy.deepcopy(order), pickle.loads(pickle.dumps(order))):
        assert noted(twin) == []
        twin.record(OrderPaid("o1"))
    assert noted(order) == [OrderShipped("o1")]


def test_an_entity_does_not_outlive_its_last_reference() -> None:
    order = Plain("o1")
    order.ship()
    watched = weakref.ref(order)
    del order
    gc.collect()
    assert watched() is None


def test_time_of_recording_is_in_microseconds_and_may_be_told() -> None:
    order = Plain("o1")
    order.ship()
    assert 1_700_000_000_000_000 < pending(order)[0].at < 10_000_000_000_000_000
    with recording_time(lambda: 42):
        order.ship()
    order.ship()
    assert [item.at == 42 for item in pending(order)] == [False, True, False]


def test_events_of_several_entities_keep_their_common_order() -> None:
    first, second = Plain("o1"), Plain("o2")
    first.ship()
    second.ship()
    first.record(OrderPaid("o1"))
    items = sorted((*pending(first), *pending(second)), key=lambda item: item.number)
    assert [item.event for item in items] == [
        OrderShipped("o1"),
        OrderShipped("o2"),
        OrderPaid("o1"),
    ]


# --- merge and cancel ----------------------------------------------------------------------------


@pytest.mark.requirement("R45")
def test_two_changes_merge_by_a_text() -> None:
    order = Plain("o1")
    order.record(OrderShipped("o1", 1), merge="boxes")
    order.record(OrderShipped("o1", 2))
    order.record(OrderPaid("o1"), merge="boxes")
    order.record(OrderShipped("o1", 3), merge="boxes")
    assert noted(order) == [OrderShipped("o1", 2), OrderPaid("o1"), OrderShipped("o1", 3)]


@pytest.mark.requirement("R45")
def test_two_changes_merge_by_a_function() -> None:
    def add(earlier: OrderShipped, later: OrderShipped) -> OrderShipped:
        return OrderShipped(later.order_ref, earlier.boxes + later.boxes)

    order = Plain("o1")
    order.record(OrderPaid("o1"))
    for boxes in (1, 2, 3):
        order.record(OrderShipped("o1", boxes), merge=add)
    assert noted(order) == [OrderPaid("o1"), OrderShipped("o1", 6)]
    assert pending(order)[1].body == b'{"order_ref":"o1","boxes":6}'


@pytest.mark.requirement("R45")
def test_a_merge_may_leave_neither() -> None:
    order = Plain("o1")
    order.record(OrderShipped("o1"))
    order.record(OrderShipped("o1"), merge=lambda _earlier, _later: None)
    assert noted(order) == []


@pytest.mark.requirement("R45")
def test_pending_events_can_be_cancelled() -> None:
    order = Plain("o1")
    order.record(OrderPaid("o1"))
    order.record(OrderShipped("o1", 1))
    order.record(OrderShipped("o1", 2))
    assert order.cancel_events(lambda event: getattr(event, "boxes", 0) == 2) == 1
    assert noted(order) == [OrderPaid("o1"), OrderShipped("o1", 1)]
    assert order.cancel_events(OrderShipped) == 1
    assert order.cancel_events(OrderShipped) == 0
    assert noted(order) == [OrderPaid("o1")]
    assert order.cancel_events(Event) == 1


# --- header --------------------------------------------------------------------------------------


@pytest.mark.requirement("R1", "R22")
def test_the_header_tells_id_time_entity_cause_and_actor() -> None:
    cause = Envelope(
        id="c1",
        type="orders.ShipOrder",
        topic="orders",
        actor="ann",
        hops=2,
        traceparent="00-a-b-01",
    )
    with recording_time(lambda: 1_700_000_000_000_001):
        item = recorded(OrderShipped("o1"))
    envelope = envelope_of(
        item, message_id="m1", origin=Origin.following(cause, source="shop"), subject="Order/o1"
    )
    assert envelope == Envelope(
        id="m1",
        type="orders.OrderShipped",
        topic="orders",
        body=b'{"order_ref":"o1","boxes":1}',
        time=1_700_000_000_000_001,
        source="shop",
        subject="Order/o1",
        correlation_id="c1",
        causation_id="c1",
        actor="ann",
        hops=3,
        traceparent="00-a-b-01",
    )
    with pytest.raises(AttributeError):
        envelope.id = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        item.event.order_ref = "other"  # type: ignore[attr-defined]


def test_a_first_message_is_the_story_itself() -> None:
    envelope = envelope_of(recorded(OrderPaid("o1")), message_id="m1", origin=Origin())
    assert envelope.correlation_id == "m1"
    assert envelope.causation_id == ""


def test_a_chain_without_end_is_refused() -> None:
    endless = Origin(correlation_id="c1", hops=HOPS_MAX + 1)
    with pytest.raises(NotRecordable, match="answer each other"):
        envelope_of(recorded(OrderPaid("o1")), message_id="m1", origin=endless)


def test_the_subject_is_the_entity_and_may_be_named_by_it() -> None:
    assert Plain("o1").event_subject() == "Plain/o1"
    assert Plain.__new__(Plain).event_subject() == ""
    assert Alias().event_subject() == "Account/7"


def test_an_origin_holds_for_a_block() -> None:
    assert current_origin() == Origin()
    with originating(Origin(actor="ann")):
        with originating(Origin(actor="bob")):
            assert current_origin().actor == "bob"
        assert current_origin().actor == "ann"
    assert current_origin() == Origin()


# --- subscribers ---------------------------------------------------------------------------------


def tell(event: OrderShipped) -> None: ...


@external_effects
async def send_mail(event: OrderShipped) -> None: ...


@pytest.mark.requirement("R20")
def test_a_subscriber_wants_its_type_and_what_derives_from_it() -> None:
    everything = Subscriber(event=Event, function=tell)
    shipped = Subscriber(event=OrderShipped, function=tell)
    assert everything.wants(OrderPaid("o1"))
    assert shipped.wants(OrderShipped("o1"))
    assert not shipped.wants(OrderPaid("o1"))
    assert shipped.name.endswith("test_recording.tell")
    assert shipped.mode is Mode.DURABLE


@pytest.mark.requirement("R43")
def test_external_effects_are_refused_inside_a_transaction_at_start_up() -> None:
    class Wrapped:
        def __init__(self) -> None:
            self.__wrapped__ = send_mail

        async def __call__(self, event: OrderShipped) -> None: ...

    for function in (send_mail, Wrapped()):
        with pytest.raises(DefinitionError) as refusal:
            Subscriber(
                event=OrderShipped,
                function=function,
                mode=Mode.IN_TRANSACTION,
                location="shop.py:7",
            )
        assert str(refusal.value).startswith("shop.py:7: subscriber")
        assert "external_effects" in str(refusal.value)
    for mode in (Mode.DURABLE, Mode.AFTER_COMMIT):
        Subscriber(event=OrderShipped, function=send_mail, mode=mode)


@pytest.mark.parametrize("what", [ShipOrder, str, OrderPaid("o1")])
def test_only_events_have_subscribers(what: Any) -> None:
    with pytest.raises(DefinitionError, match="expected a class of events"):
        Subscriber(event=what, function=tell)
