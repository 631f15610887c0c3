"""Events that entities record, and the header they get when they leave.

An entity says what happened to it and knows nothing of who listens:

    class Order(RecordsEvents, Base):
        def ship(self) -> None:
            self.shipped = True
            self.record(OrderShipped(self.reference))

Nothing is sent by recording. A session of `sagacity.backends.sql.session` turns the pending events
of the entities it holds into outbox rows when it commits; a unit test reads `pending_events`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar, cast

import msgspec

from sagacity.core.delivery import HOPS_MAX, Envelope
from sagacity.core.errors import DefinitionError, NotRecordable
from sagacity.core.messages import Event, encode_message, message_type

__all__ = [
    "Holder",
    "Mode",
    "Origin",
    "RecordedEvent",
    "RecordsEvents",
    "Subscriber",
    "current_origin",
    "envelope_of",
    "external_effects",
    "find_holders_with",
    "has_external_effects",
    "originating",
    "recorded",
    "recording_now",
    "recording_time",
]

E = TypeVar("E", bound=Event)
F = TypeVar("F", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------------ origin


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Why messages come to be: who asked, and what led to them. All of it may be empty."""

    source: str = ""
    """The service at work."""
    correlation_id: str = ""
    """Shared by everything that follows from one first message."""
    causation_id: str = ""
    """Id of the message being worked on."""
    actor: str = ""
    """Who or what asked for it."""
    hops: int = 0
    """How many messages led here since the first one."""
    traceparent: str = ""
    tracestate: str = ""
    """W3C trace context of the span at work."""

    @classmethod
    def following(cls, envelope: Envelope, *, source: str = "") -> Origin:
        """The origin of whatever is done because `envelope` arrived at service `source`."""
        return cls(
            source=source,
            correlation_id=envelope.correlation_id or envelope.id,
            causation_id=envelope.id,
            actor=envelope.actor,
            hops=envelope.hops + 1,
            traceparent=envelope.traceparent,
            tracestate=envelope.tracestate,
        )


_origin: ContextVar[Origin] = ContextVar("sagacity_origin", default=Origin())  # noqa: B039 - frozen


def current_origin() -> Origin:
    """The origin set by the innermost `originating`; an empty one outside."""
    return _origin.get()


@contextmanager
def originating(origin: Origin) -> Generator[Origin]:
    """Gives everything recorded in this block, and in tasks started in it, the same origin.

    For an HTTP request or a command line; a participant's origin is set for it.
    """
    token = _origin.set(origin)
    try:
        yield origin
    finally:
        _origin.reset(token)


# ---------------------------------------------------------------------------------------- recording


def _system_time() -> int:
    return time.time_ns() // 1000


_now: ContextVar[Callable[[], int]] = ContextVar("sagacity_recording_time", default=_system_time)


def recording_now() -> int:
    """The time of recording, in microseconds since 1970, UTC."""
    return _now.get()()


@contextmanager
def recording_time(now: Callable[[], int]) -> Generator[None]:
    """Lets `now` (microseconds since 1970, UTC) tell the time of recording inside the block."""
    token = _now.set(now)
    try:
        yield
    finally:
        _now.reset(token)


class RecordedEvent(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An event that waits for its commit."""

    event: Event
    body: bytes
    """The event as JSON, encoded when it was recorded: later changes cannot reach it."""
    at: int
    """When it was recorded, in microseconds since 1970, UTC."""
    number: int
    """Grows with every recording of this process: the order of events across entities."""
    origin: Origin
    """The origin at the time of recording; see `originating`."""
    merge: str = ""
    """The text it was recorded with."""


_numbers = itertools.count(1)


@functools.lru_cache(maxsize=4096)
def _decoder(kind: Hashable) -> msgspec.json.Decoder[Any] | None:
    try:
        return msgspec.json.Decoder(cast("type[Event]", kind))
    except (TypeError, NameError):
        return None  # not decodable in this process; a registry says so where it matters


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, msgspec.Struct):
        yield from (getattr(value, name) for name in value.__struct_fields__)
    elif isinstance(value, Mapping):
        for key, part in cast("Mapping[object, object]", value).items():
            yield key
            yield part
    elif isinstance(value, (Sequence, AbstractSet)) and not isinstance(
        value, (str, bytes, bytearray)
    ):
        yield from cast("Sequence[object]", value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name, None) for field in fields(value))
    elif hasattr(value, "__attrs_attrs__"):
        yield from (
            getattr(value, field.name, None) for field in cast("Any", value).__attrs_attrs__
        )


def _find_entity(event: Event) -> object | None:
    # An entity that is a dataclass would be encoded without complaint, with all that hangs on it.
    waiting: list[object] = [event]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, RecordsEvents) or hasattr(value, "_sa_instance_state"):
            return value
        if id(value) not in seen:
            seen.add(id(value))
            waiting.extend(_parts(value))
    return None


def recorded(event: Event, merge: str = "") -> RecordedEvent:
    """`event`, encoded now.

    Raises NotRecordable for anything that is no event, for a payload that holds an entity or another
    live object, and for values that do not fit the declared types of its fields.
    """
    if not isinstance(cast("object", event), Event):
        found = type(event).__qualname__
        raise NotRecordable(
            f"recording {found}: expected an Event, got {found}; an entity states what happened, "
            "and only a saga sends commands"
        )
    facts = message_type(event)
    entity = _find_entity(event)
    if entity is not None:
        raise NotRecordable(
            f"event {facts.name} carries the entity {type(entity).__qualname__}; expected ids and plain "
            "values; put the entity's id and the changed values into the event"
        )
    body = encode_message(event)
    decoder = _decoder(cast("Hashable", type(event)))
    if decoder is not None:
        try:
            decoder.decode(body)
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise NotRecordable(
                f"event {facts.name} does not fit its own declaration: {error}; expected values of the "
                f"types declared at {facts.location}; no consumer could read it"
            ) from error
    return RecordedEvent(
        event=event,
        body=body,
        at=_now.get()(),
        number=next(_numbers),
        origin=_origin.get(),
        merge=merge,
    )


class Holder(Protocol):
    """Whoever will turn an entity's pending events into messages: a session's open transaction."""

    def before_change(self, recorder: RecordsEvents) -> None:
        """Told before the pending events of `recorder` change, so that it can keep them and undo."""
        ...


_find_holder: list[Callable[[RecordsEvents], Holder | None]] = []


def find_holders_with(find: Callable[[RecordsEvents], Holder | None]) -> None:
    """Adds a way to find the holder of an entity; a backend calls this once, when imported."""
    _find_holder.append(find)


class _Pending:
    """The list of one entity. A copy or an unpickled twin of the entity starts with an empty one."""

    __slots__ = ("events", "owner")

    def __init__(self, owner: int = 0) -> None:
        self.owner = owner
        self.events: list[RecordedEvent] = []

    def __deepcopy__(self, _: object) -> _Pending:
        return _Pending()

    def __reduce__(self) -> tuple[type[_Pending], tuple[()]]:
        return _Pending, ()


class RecordsEvents:
    """Lets any class record events: SQLAlchemy entity, dataclass (slots and frozen too) or plain.

    Needs no ``__init__``, so it works for objects that an ORM builds without calling it. There is no
    way from here to the bus, on purpose.
    """

    __slots__ = ("_recorded_events",)

    def record(self, event: E, *, merge: Callable[[E, E], E | None] | str | None = None) -> None:
        """Notes that something happened; it becomes a message when the entity's session commits.

        `merge` lets it take the place of a pending event of the same class. A text: of the one that was
        recorded with the same text. A function: it gets (the latest one, this one) and returns the
        event to keep, or None to keep neither. Raises NotRecordable as `recorded`.
        """
        _record(self, event, merge)

    @property
    def pending_events(self) -> tuple[Event, ...]:
        """What is recorded and not committed yet, oldest first. Reading it changes nothing."""
        return tuple(item.event for item in pending(self))

    def cancel_events(self, which: type[Event] | Callable[[Event], bool]) -> int:
        """Takes back pending events: all of a class, or those a function says True to.

        Returns how many. What was committed, or written with `write_events`, cannot be taken back.
        """
        if isinstance(which, type):
            kept = [item for item in pending(self) if not isinstance(item.event, which)]
        else:
            kept = [item for item in pending(self) if not which(item.event)]
        count = len(pending(self)) - len(kept)
        if count:
            replace_pending(self, kept)
        return count

    def drain_events(self) -> tuple[RecordedEvent, ...]:
        """Hands over the pending events, oldest first, and empties the list."""
        taken = pending(self)
        if taken:
            replace_pending(self, ())
        return taken

    def event_subject(self) -> str:
        """What this entity's events are about: ``EntityType/id``, or "" while it has no `id`.

        Override it for another name or key. It is asked at commit, when generated keys are known;
        a mapped entity that does not override it is named by its primary key.
        """
        key = getattr(self, "id", None)
        return "" if key is None else f"{type(self).__name__}/{key}"


def pending(recorder: RecordsEvents) -> tuple[RecordedEvent, ...]:
    """The pending events of an entity with their bodies."""
    return tuple(_own_list(recorder))


def replace_pending(
    recorder: RecordsEvents, items: Sequence[RecordedEvent], *, quietly: bool = False
) -> None:
    """Sets the pending events of an entity; `quietly` where its holder does it."""
    if not quietly:
        _tell_holders(recorder)
    _own_list(recorder)[:] = items


def _own_list(recorder: RecordsEvents) -> list[RecordedEvent]:
    mine: _Pending | None = getattr(recorder, "_recorded_events", None)
    if mine is None or mine.owner != id(recorder):
        mine = _Pending(id(recorder))
        object.__setattr__(recorder, "_recorded_events", mine)  # frozen dataclasses record too
    return mine.events


def _tell_holders(recorder: RecordsEvents) -> None:
    for find in _find_holder:
        holder = find(recorder)
        if holder is not None:
            holder.before_change(recorder)


def _record(
    recorder: RecordsEvents, event: Any, merge: Callable[[Any, Any], Any] | str | None
) -> None:
    new: RecordedEvent | None = recorded(event, merge if isinstance(merge, str) else "")
    kept = list(pending(recorder))
    same = [item for item in kept if type(item.event) is type(event)]
    if isinstance(merge, str):
        kept = [item for item in kept if item not in same or item.merge != merge]
    elif merge is not None and same:
        kept.remove(same[-1])
        result = merge(same[-1].event, event)
        new = None if result is None else recorded(result)
    if new is not None:
        kept.append(new)
    replace_pending(recorder, kept)


# ----------------------------------------------------------------------------------------- envelope


def envelope_of(
    item: RecordedEvent, *, message_id: str, origin: Origin, subject: str = ""
) -> Envelope:
    """The message that a recorded event becomes.

    Raises NotRecordable after `HOPS_MAX` messages that led to each other: an endless loop.
    """
    facts = message_type(item.event)
    if origin.hops > HOPS_MAX:
        raise NotRecordable(
            f"event {facts.name} of {subject or 'no entity'} is number {origin.hops} of a chain of messages "
            f"that cause each other (correlation {origin.correlation_id}); expected at most {HOPS_MAX}; "
            "two subscribers seem to answer each other without end"
        )
    return Envelope(
        id=message_id,
        type=facts.name,
        topic=facts.topic,
        body=item.body,
        version=facts.version,
        time=item.at,
        source=origin.source,
        subject=subject,
        correlation_id=origin.correlation_id or message_id,
        causation_id=origin.causation_id,
        actor=origin.actor,
        hops=origin.hops,
        traceparent=origin.traceparent,
        tracestate=origin.tracestate,
    )


# -------------------------------------------------------------------------------------- subscribers


class Mode(StrEnum):
    """When and where a subscriber runs."""

    DURABLE = "durable"
    """Over the bus, in any process, again and again until it succeeds. The default."""
    IN_TRANSACTION = "in_transaction"
    """Inside the publisher's transaction, before commit: same database only; raising vetoes all."""
    AFTER_COMMIT = "after_commit"
    """Lossy: in the publisher's process after its commit, once, and never if that process dies."""


def external_effects(function: F) -> F:
    """Marks a function that reaches beyond the database: mail, HTTP, files.

    Such a function is refused as `Mode.IN_TRANSACTION` subscriber, for a rollback cannot undo it.
    """
    function.__external_effects__ = True  # type: ignore[attr-defined]
    return function


def has_external_effects(function: Callable[..., Any]) -> bool:
    """True where `function`, or what it wraps, is marked by `external_effects`."""
    seen: Any = function
    while seen is not None:
        if getattr(seen, "__external_effects__", False):
            return True
        seen = getattr(seen, "__wrapped__", None) or getattr(seen, "func", None)
    return False


class Subscriber(msgspec.Struct, frozen=True, kw_only=True):
    """A function that is called for each event of a class (subclasses included).

    It may be `async`, and takes the event, or the event and a context. Raises DefinitionError for a
    function with external effects in `Mode.IN_TRANSACTION`, and for a class that is no event.
    """

    event: type[Event]
    function: Callable[..., Any]
    mode: Mode = Mode.DURABLE
    name: str = ""
    """Names it in logs and in the inbox; by default module and name of the function."""
    location: str = ""
    """``file:line`` of its declaration."""

    def __post_init__(self) -> None:
        function = self.function
        if not self.name:
            module = getattr(function, "__module__", "")
            name = getattr(function, "__qualname__", type(function).__qualname__)
            msgspec.structs.force_setattr(self, "name", f"{module}.{name}".removeprefix("."))
        kind: object = self.event
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            raise DefinitionError(
                f"subscriber {self.name}: expected a class of events, got {kind!r}; commands have "
                "one handler, see @handles",
                self.location,
            )
        if self.mode is Mode.IN_TRANSACTION and has_external_effects(function):
            raise DefinitionError(
                f"subscriber {self.name} of {message_type(self.event).name} is marked with "
                "@external_effects and would run inside the transaction, where a rollback cannot undo "
                "them; expected a function that touches only the database; subscribe it as durable",
                self.location,
            )

    def wants(self, event: Event) -> bool:
        """True for the events it is to be called with."""
        return isinstance(event, self.event)
