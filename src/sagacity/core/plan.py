"""Everything that one SQL transaction must write, as a value.

`plan_batch` (in `sagacity.core.batch`) folds `decide` over a batch of arrivals and returns a `Plan`.
A store writes a plan without understanding it; only a store can make it true, and nothing leaves
before it is.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from sagacity.core.delivery import Envelope
from sagacity.core.instance import Instance


class Loaded(msgspec.Struct):
    """What a transaction has read, and what it could not get."""

    instances: dict[tuple[str, str], Instance]
    """(saga_type, saga_key) -> instance. Locked until the transaction ends, or compared when it writes."""
    busy: set[tuple[str, str]]
    """Instances another transaction holds. What is in neither does not exist."""


class Known(msgspec.Struct):
    """What the guards know of a batch."""

    seen: set[tuple[str, str]]
    """(consumer, message_id) that are in the inbox."""
    timeouts: set[tuple[str, str, int]]
    """(uid, name, generation) that are still armed."""
    parked: set[tuple[str, str]]
    """(consumer, message_id) that are still parked."""


class Source(StrEnum):
    """Where an arrival comes from, and so what guards it against a second effect."""

    BUS = "bus"
    """A stream entry; guarded by the inbox."""
    TIMEOUT = "timeout"
    """A timeout row; guarded by deleting the row in the same transaction."""
    PARKED = "parked"
    """A parked row; guarded by deleting the row in the same transaction."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message for one saga instance (the same message may arrive at several)."""

    envelope: Envelope
    consumer: str
    """Inbox name: the saga type, and ``type#key`` where a message reaches several instances. For a
    parked row: the consumer of that row."""
    saga_type: str
    saga_key: str
    """Empty where a further key was looked up and no instance has it."""
    parks_as: str = ""
    """Consumer of the parked row should it fail; by default `consumer`."""
    by: tuple[str, str] | None = None
    """Name and value of the further key it was looked up by."""
    waits_for: str = ""
    """``key name=value`` it looked by; what it waits for where there is no instance."""
    missing: str = "ignore"
    """Policy where there is no instance: ``wait``, ``ignore``, ``dead-letter``."""
    source: Source = Source.BUS
    attempts: int = 0
    """Failed attempts so far, from the parked row."""
    parked_at: int = 0
    """When it was first parked."""

    @property
    def looked_up(self) -> bool:
        """True where instances are looked up by a further key: another look may find other ones."""
        return self.by is not None

    @property
    def guards(self) -> tuple[tuple[str, str], ...]:
        """The inbox keys to read for it, (consumer, message id), whose presence is told in `Known.seen`.

        A message that is looked up leaves ``type#key`` for each instance it reached, ``type#`` for
        having reached any, and ``type`` where it found none and was parked, ignored or given up.
        """
        message_id = self.envelope.id
        match self.source:
            case Source.BUS if self.looked_up:
                names = dict.fromkeys((self.consumer, self.saga_type, f"{self.saga_type}#"))
                return tuple((name, message_id) for name in names)
            case Source.BUS:
                return ((self.consumer, message_id),)
            case Source.PARKED if (
                self.looked_up and self.saga_key and self.consumer != self.instance_consumer
            ):
                return ((self.instance_consumer, message_id),)
            case _:
                return ()

    @property
    def instance_consumer(self) -> str:
        """Inbox name that names the instance too."""
        return f"{self.saga_type}#{self.saga_key}"


class Outcome(StrEnum):
    """What became of an arrival."""

    HANDLED = "handled"
    IGNORED = "ignored"
    DEFERRED = "deferred"
    """Kept in the instance until a state handles it."""
    PARKED = "parked"
    """Kept in SQL: failed and tried again later, waiting for its instance, or behind another."""
    DEAD = "dead"
    """A dead letter."""
    DUPLICATE = "duplicate"
    BUSY = "busy"
    """Another worker holds the instance; neither an attempt nor an error."""


class InboxRow(msgspec.Struct, frozen=True, gc=False):
    """A consumer has taken responsibility for a message, once and for all."""

    consumer: str
    message_id: str
    outcome: Outcome


class OutboxRow(msgspec.Struct, frozen=True, gc=False):
    """A message to publish after commit; rows of one lane leave in order."""

    lane: str
    """The saga instance's uid, the entity, or an empty string where order does not matter."""
    envelope: Envelope


class TimeoutRow(msgspec.Struct, frozen=True, gc=False):
    """A timeout of one instance. Setting the same name again replaces it."""

    uid: str
    name: str
    generation: int
    due_at: int
    saga_type: str
    saga_key: str


class CorrelationRow(msgspec.Struct, frozen=True, gc=False):
    """A further key of an instance."""

    saga_type: str
    name: str
    value: str
    saga_key: str
    unique: bool


class ParkedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A message held in SQL for one consumer.

    `due_at` None means: not before it is released (`Plan.released`). For a participant's row `lane`
    and `sequence` keep commands of one saga instance in order.
    """

    consumer: str
    message_id: str
    saga_type: str = ""
    """Set for a saga's row, empty for a participant's."""
    saga_key: str = ""
    """The instance the row is for, where one is known."""
    lane: str = ""
    """Participant: ``uid:topic`` of the sending instance, or empty. Saga: ``key name=value`` of the missing
    instance the row waits for, or empty."""
    sequence: int = 0
    """Participant: `Envelope.sequence` of the command."""
    due_at: int | None
    attempts: int
    parked_at: int
    reason: str
    """``retry``, ``missing``, ``behind``, ``work``."""
    error: str = ""
    envelope: Envelope


class DeadLetterRow(msgspec.Struct, frozen=True, kw_only=True):
    """A message that nobody will try again unless an operator replays it."""

    consumer: str
    message_id: str
    topic: str
    message_type: str
    reason: str
    """``undecodable``, ``oversized``, ``unknown-type``, ``mistyped``, ``failed``, ``missing``, ``lost``, ``killer``."""
    error: str
    """The error with its traceback."""
    attempts: int
    entry: bytes
    """msgpack of the envelope, or of the raw fields where it could not be decoded."""
    decoded: bool
    """True where `entry` is an envelope; only these can be replayed."""
    saga_type: str = ""
    saga_key: str = ""
    lane: str = ""
    sequence: int = 0
    """As in the `ParkedRow` that a replay makes of it."""
    at: int

    @property
    def unrouted(self) -> bool:
        """True for a message of which it is not known whom it concerns: nobody has looked at it yet.

        Its consumer is the service's name and ``!``; replayed, it is sent over the bus once more.
        """
        return not self.saga_type and self.consumer.endswith("!")


class TransitionRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One line of an instance's history."""

    uid: str
    version: int
    saga_type: str
    saga_key: str
    at: int
    message_id: str
    message_type: str
    handler: str
    state_from: str
    state_to: str
    status: str
    correlation_id: str
    effects: bytes
    """JSON: commands, events, timeouts, reason."""
    entry: bytes
    """msgpack of the envelope: replaying these in version order gives the same instance."""


class Plan(msgspec.Struct, kw_only=True):
    """What one transaction writes. All lists may be empty; a store writes them in this order."""

    now: int
    saga_inserts: list[Instance] = msgspec.field(default_factory=list[Instance])
    """New instances. One that exists already is a lost race: the store raises Conflict."""
    saga_updates: list[tuple[Instance, int]] = msgspec.field(
        default_factory=list[tuple[Instance, int]]
    )
    """The instance after, and the version it had before: fewer rows updated raise Conflict."""
    inbox: list[InboxRow] = msgspec.field(default_factory=list[InboxRow])
    """A row that exists already raises Conflict."""
    correlations_dropped: list[tuple[str, str]] = msgspec.field(
        default_factory=list[tuple[str, str]]
    )
    """(saga_type, saga_key) of finished instances whose keys are free again; deleted before
    `correlations` are written, which may be those of the next instance with that key."""
    correlations_past: list[tuple[str, str, str]] = msgspec.field(
        default_factory=list[tuple[str, str, str]]
    )
    """(saga_type, name, value) that finished instances had: a late event is told from an early one."""
    correlations: list[CorrelationRow] = msgspec.field(default_factory=list[CorrelationRow])
    """A unique one that belongs to another instance raises KeyTaken; a known one is no error."""
    outbox: list[OutboxRow] = msgspec.field(default_factory=list[OutboxRow])
    timeouts_cancelled: list[tuple[str, str]] = msgspec.field(default_factory=list[tuple[str, str]])
    """(uid, name); one that is not there is no error. Deleted before `timeouts` are written."""
    timeouts: list[TimeoutRow] = msgspec.field(default_factory=list[TimeoutRow])
    unparked: list[tuple[str, str]] = msgspec.field(default_factory=list[tuple[str, str]])
    """(consumer, message_id) of parked rows this batch took over; a missing one raises Conflict."""
    parked: list[ParkedRow] = msgspec.field(default_factory=list[ParkedRow])
    """May name a row of `unparked` again: it was taken over and failed once more."""
    released: list[tuple[str, str]] = msgspec.field(default_factory=list[tuple[str, str]])
    """(consumer, message_id) of parked rows that are due at once from now on; missing is no error."""
    woken: list[tuple[str, str]] = msgspec.field(default_factory=list[tuple[str, str]])
    """(saga_type, lane): rows parked for a missing instance that are due at once from now on."""
    dead_letters: list[DeadLetterRow] = msgspec.field(default_factory=list[DeadLetterRow])
    transitions: list[TransitionRow] = msgspec.field(default_factory=list[TransitionRow])

    @property
    def lanes(self) -> set[str]:
        """Outbox lanes this plan writes to."""
        return {row.lane for row in self.outbox if row.lane}

    @property
    def empty(self) -> bool:
        """True where the transaction would write nothing."""
        return not any(getattr(self, name) for name in self.__struct_fields__ if name != "now")
