"""Everything that one SQL transaction must write, as a value.

`plan_batch` folds `decide` over a batch of arrivals and returns a `Plan`. A store writes a plan
without understanding it; only a store can make it true, and nothing leaves before it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import msgspec

from sagacity.core.decide import (
    Decision,
    Sender,
    TimeoutDue,
    decide,
    decode_framework,
    is_control,
    take_deferred,
    timeout_envelope,
)
from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope, encode_entry, spread
from sagacity.core.errors import DecodeError, KeyTaken, LimitExceeded
from sagacity.core.instance import Instance, Status
from sagacity.core.messages import Message


class Loaded(msgspec.Struct):
    """What a transaction holds locked, and what it could not get."""

    instances: dict[tuple[str, str], Instance]
    """(saga_type, saga_key) -> instance, locked until the transaction ends."""
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


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
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
    delivery: int = -1
    """Index of the delivery in its batch; -1 for what does not come from the bus."""

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


class InboxRow(msgspec.Struct, frozen=True):
    """A consumer has taken responsibility for a message, once and for all."""

    consumer: str
    message_id: str
    outcome: Outcome


class OutboxRow(msgspec.Struct, frozen=True):
    """A message to publish after commit; rows of one lane leave in order."""

    lane: str
    """The saga instance's uid, the entity, or an empty string where order does not matter."""
    envelope: Envelope


class TimeoutRow(msgspec.Struct, frozen=True):
    """A timeout of one instance. Setting the same name again replaces it."""

    uid: str
    name: str
    generation: int
    due_at: int
    saga_type: str
    saga_key: str


class CorrelationRow(msgspec.Struct, frozen=True):
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


class TransitionRow(msgspec.Struct, frozen=True, kw_only=True):
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


# ------------------------------------------------------------------------------------- plan_batch

Decode = Callable[[Envelope], Message]
"""Gives the message of an envelope, a fresh one with each call. Raises DecodeError."""


class Retry(msgspec.Struct, frozen=True):
    """When a message that failed, or found no instance, is tried again; times in microseconds."""

    attempts_max: int = 8
    base_us: int = 500_000
    cap_us: int = 300_000_000
    missing_us: int = 60_000_000
    """How long a message waits for an instance to appear before it becomes a dead letter."""

    def due_at(self, now: int, attempts: int, *key: str) -> int:
        """When attempt number `attempts` + 1 is due.

        The first gap is between half of `base_us` and `base_us`; both bounds double with each
        attempt up to the cap. So gaps always grow, and messages that failed together spread out.
        """
        low = min(self.cap_us // 2, self.base_us // 2 << min(max(attempts - 1, 0), 40))
        return now + low + int(low * spread(*key, str(attempts)))


class Catalog(msgspec.Struct, frozen=True):
    """What the sagas of one service are, and how they speak."""

    definitions: dict[str, Definition]
    """Saga type -> definition."""
    decode: Decode
    sender: Sender
    retry: Retry = Retry()


class Routed(msgspec.Struct, frozen=True):
    """Where one message goes for one saga type."""

    definition: Definition
    keys: tuple[str, ...]
    """Instances named by the message itself."""
    lookup: tuple[str, str] | None
    """Or the further key, name and value, that the store must be asked for."""
    missing: str
    waits_for: str


def route(catalog: Catalog, envelope: Envelope, only: str = "") -> list[Routed]:
    """The saga types that a message concerns, and how to find their instances.

    A reply names its instance in the header; any other event is looked up by the key that the saga
    declares for it. A command is for a participant, though its header names the saga that sent it
    and whose service may listen to the same topic. With `only`, just that saga type is looked at.
    Raises DecodeError.
    """
    if envelope.sequence or envelope.undoes:
        return []
    addressed = catalog.definitions.get(envelope.saga_type)
    found: list[Routed] = []
    for saga_type, definition in catalog.definitions.items():
        if only and saga_type != only:
            continue
        event_route = definition.routes.get(envelope.type)
        if definition is addressed and envelope.saga_key:
            missing = event_route.missing if event_route and event_route.starts else "ignore"
            found.append(Routed(definition, (envelope.saga_key,), None, missing, ""))
        elif event_route is not None:
            keys = event_route.keys(catalog.decode(envelope))
            if event_route.key_name:
                for value in keys:
                    name = event_route.key_name
                    found.append(
                        Routed(
                            definition, (), (name, value), event_route.missing, f"{name}={value}"
                        )
                    )
            elif keys:
                waits_for = f"{definition.key_field}={keys[0]}"
                found.append(Routed(definition, keys, None, event_route.missing, waits_for))
    return found


def arrivals_of(
    routed: Routed,
    keys: Sequence[str],
    envelope: Envelope,
    *,
    source: Source = Source.BUS,
    delivery: int = -1,
    row: ParkedRow | None = None,
) -> list[Arrival]:
    """The arrivals of one message at the instances `keys` of one saga type.

    Where the message may reach several instances the inbox key names the instance too.
    """
    saga_type = routed.definition.saga_type
    looked_up = routed.lookup is not None
    if row is not None and row.saga_key:
        keys = (row.saga_key,)  # it was parked for this one; the others had their own rows
    fans_out = looked_up or len(routed.keys) > 1
    made: list[Arrival] = []
    for key in keys or ("",):
        own = f"{saga_type}#{key}" if fans_out and key else saga_type
        waits_for = routed.waits_for
        if len(routed.keys) > 1:
            waits_for = f"{routed.definition.key_field}={key}"
        made.append(
            Arrival(
                envelope=envelope,
                consumer=own if row is None else row.consumer,
                saga_type=saga_type,
                saga_key=key,
                parks_as=row.consumer if row is not None and not (looked_up and key) else own,
                waits_for=waits_for,
                missing=routed.missing,
                source=source,
                attempts=row.attempts if row is not None else 0,
                parked_at=row.parked_at if row is not None else 0,
                delivery=delivery,
                by=routed.lookup,
            )
        )
    return made


def timeout_arrival(
    *, uid: str, name: str, generation: int, due_at: int, saga_type: str, saga_key: str
) -> Arrival:
    """The arrival of a due timeout at its instance."""
    envelope = timeout_envelope(
        uid=uid,
        name=name,
        generation=generation,
        due_at=due_at,
        saga_type=saga_type,
        saga_key=saga_key,
    )
    return Arrival(
        envelope=envelope,
        consumer=saga_type,
        saga_type=saga_type,
        saga_key=saga_key,
        source=Source.TIMEOUT,
    )


def plan_batch(
    catalog: Catalog,
    arrivals: Sequence[Arrival],
    loaded: Loaded,
    known: Known,
    now: int,
    *,
    refused: Mapping[str, str] | None = None,
    taken: Mapping[tuple[str, str, str], str] | None = None,
) -> tuple[Plan, list[Outcome]]:
    """What one transaction must write for these arrivals, and what became of each.

    `refused` maps ids of messages whose effects the database refused to the reason: they fail.
    `taken` maps unique correlation keys (saga type, name, value) to the instance that has them.

    `loaded` and `known` were read under the locks of that transaction. A message whose handler
    raises loses only its own effects. Nothing is raised for a bad message.
    """
    batch = _Batch(catalog, loaded, known, now, refused or {}, taken or {})
    outcomes = batch.fold(arrivals)
    return batch.finish(), outcomes


class _Batch:
    """The fold: instances as they stand after each arrival, and the rows so far."""

    def __init__(
        self,
        catalog: Catalog,
        loaded: Loaded,
        known: Known,
        now: int,
        refused: Mapping[str, str],
        taken: Mapping[tuple[str, str, str], str],
    ) -> None:
        self.catalog, self.loaded, self.known, self.now = catalog, loaded, known, now
        self.refused, self.claims = refused, dict(taken)
        self.plan = Plan(now=now)
        self.instances = dict(loaded.instances)
        self.changed: set[tuple[str, str]] = set()
        self.taken: set[tuple[str, str]] = set()
        self.seen = set(known.seen)
        self.due = set(known.timeouts)
        self.met: dict[tuple[str, str, str], list[str]] = {}
        """(saga type, key name, value) -> instances that took up this key in this batch."""
        self.reached: set[tuple[str, str, str]] = set()
        """(message id, saga type, saga key) that have met."""

    def fold(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Handles each arrival in turn; the ones that found no instance once more at the end.

        No result may depend on which messages share a batch: a message also meets the instances that
        took up its key earlier in this batch, which the store could not know of.
        """
        # A parked row that reaches several instances is taken over once, for all of them or none.
        held = {
            (a.consumer, a.envelope.id)
            for a in arrivals
            if a.source is Source.PARKED and (a.saga_type, a.saga_key) in self.loaded.busy
        }
        outcomes = [
            Outcome.BUSY
            if a.source is Source.PARKED and (a.consumer, a.envelope.id) in held
            else self.meet(a)
            for a in arrivals
        ]
        return [
            self.meet_late(arrival) if outcome is None else outcome
            for arrival, outcome in zip(arrivals, outcomes, strict=True)
        ]

    def meet(self, arrival: Arrival) -> Outcome | None:
        """The arrival at its instance and at those that took up its key in this batch.

        None: there is no instance so far.
        """
        outcome: Outcome | None = None
        if arrival.saga_key:
            self.reached.add((arrival.envelope.id, arrival.saga_type, arrival.saga_key))
            outcome = self.arrive(arrival)
        for key in self.met.get((arrival.saga_type, *arrival.by), ()) if arrival.by else ():
            spot = (arrival.envelope.id, arrival.saga_type, key)
            if spot not in self.reached:
                self.reached.add(spot)
                further = self.arrive(_at(arrival, key))
                outcome = outcome if outcome is Outcome.BUSY else further
        return outcome

    def meet_late(self, arrival: Arrival) -> Outcome:
        """What found no instance may have one now; else its policy decides."""
        if (arrival.saga_type, arrival.saga_key) in self.instances or arrival.by:
            outcome = self.meet(arrival)
            if outcome is not None:
                return outcome
        if not self.admitted(arrival):
            return Outcome.DUPLICATE
        return self.accept(arrival, self.missing(arrival))

    def arrive(self, arrival: Arrival) -> Outcome | None:
        place = (arrival.saga_type, arrival.saga_key)
        if place in self.loaded.busy:
            return Outcome.BUSY
        if not self.admitted(arrival):
            return Outcome.DUPLICATE
        instance = self.instances.get(place)
        if instance is not None and self.must_wait(instance, arrival):
            return self.accept(arrival, self.park_behind(arrival, instance))
        outcome = self.handle(arrival, place, instance)
        return None if outcome is None else self.accept(arrival, outcome)

    def accept(self, arrival: Arrival, outcome: Outcome) -> Outcome:
        """Notes that the message has been taken over."""
        self.receipt(arrival, outcome)
        return outcome

    # ------------------------------------------------------------------------------------- guards

    def admitted(self, arrival: Arrival) -> bool:
        """False where this arrival had its effect before; takes over the row that guards it."""
        message_id = arrival.envelope.id
        match arrival.source:
            case Source.BUS:
                names = {arrival.consumer}
                if arrival.looked_up:
                    names |= {arrival.saga_type}
                    if not arrival.saga_key:
                        names |= {f"{arrival.saga_type}#"}
                return not any((name, message_id) in self.seen for name in names)
            case Source.PARKED:
                guard = (arrival.consumer, message_id)
                if guard not in self.known.parked:
                    return False
                if guard not in self.taken:
                    self.taken.add(guard)
                    self.plan.unparked.append(guard)
                return not any(guard in self.seen for guard in arrival.guards)
            case Source.TIMEOUT:
                message = decode_framework(arrival.envelope)
                assert isinstance(message, TimeoutDue)
                row = (arrival.envelope.saga_uid, message.name, message.generation)
                if row not in self.due:
                    return False
                self.due.discard(row)
                self.plan.timeouts_cancelled.append(row[:2])
                return True

    def receipt(self, arrival: Arrival, outcome: Outcome) -> None:
        """Notes in the inbox that the message has been taken."""
        guards: list[tuple[str, str]] = []
        if arrival.source is Source.BUS:
            guards.append((arrival.consumer, arrival.envelope.id))
            if arrival.looked_up and arrival.saga_key:
                guards.append((f"{arrival.saga_type}#", arrival.envelope.id))
        elif arrival.source is Source.PARKED:
            guards += arrival.guards
        for guard in guards:
            if guard not in self.seen:
                self.seen.add(guard)
                self.plan.inbox.append(InboxRow(*guard, outcome))

    def must_wait(self, instance: Instance, arrival: Arrival) -> bool:
        """True where an earlier message of the instance failed and is still to be tried again."""
        queue = instance.ledger.parked
        if not queue or instance.status is not Status.RUNNING or is_control(arrival.envelope):
            return False
        return queue[0] != _queued(arrival)

    # ------------------------------------------------------------------------------------ outcomes

    def handle(
        self, arrival: Arrival, place: tuple[str, str], instance: Instance | None
    ) -> Outcome | None:
        """Lets the core decide; None where there is no instance, and may be one later."""
        definition = self.catalog.definitions[arrival.saga_type]
        try:
            message = self.catalog.decode(arrival.envelope)
        except DecodeError as error:
            return self.dead(arrival, instance, "mistyped", _printable(str(error)))
        if arrival.envelope.id in self.refused:
            return self.failed(arrival, instance, self.refused[arrival.envelope.id])
        try:
            decision = self.decide(definition, instance, arrival.envelope, message, place)
        except LimitExceeded as error:
            # Trying again would only hold up what might bring the instance forward.
            return self.dead(arrival, instance, "failed", _traceback(error), attempts=1)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its message's fate
            return self.failed(arrival, instance, _traceback(error))
        if decision.missing:
            return None if arrival.missing == "wait" else self.missing(arrival)
        if decision.instance is None:
            self.settled(arrival, instance)
            return Outcome.IGNORED
        after = self.dequeued(arrival, decision.instance)
        self.apply(arrival.envelope, instance, decision, after)
        if decision.deferred:
            return Outcome.DEFERRED
        self.replay_deferred(place)
        return Outcome.HANDLED

    def decide(
        self,
        definition: Definition,
        instance: Instance | None,
        envelope: Envelope,
        message: Message,
        place: tuple[str, str],
    ) -> Decision:
        """`decide`, and the unique keys it claims are free. Raises what the handler raises."""
        decision = decide(
            definition,
            instance,
            envelope,
            message,
            self.now,
            self.catalog.sender,
            key=place[1],
        )
        self.claim(place, decision)
        return decision

    def claim(self, place: tuple[str, str], decision: Decision) -> None:
        """Unique keys belong to one instance; raises KeyTaken for the second."""
        saga_type, saga_key = place
        claims = [(saga_type, key.name, key.value) for key in decision.correlated if key.unique]
        for claim in claims:
            owner = self.claims.get(claim, saga_key)
            if owner != saga_key:
                raise KeyTaken(*claim, owner)
        self.claims.update(dict.fromkeys(claims, saga_key))

    def apply(
        self, envelope: Envelope, before: Instance | None, decision: Decision, after: Instance
    ) -> None:
        """Adds the rows of one decision; `after` is its instance, with the queue as it is now."""
        plan, uid, place = self.plan, after.uid, (after.type, after.key)
        if after.status is not Status.RUNNING and after.ledger.parked:
            # Order means nothing any more; each is looked at once, and ignored or taken as an answer.
            plan.released.extend(
                entry for entry in after.ledger.parked if entry not in plan.released
            )
            after = _with_parked(after, ())
        self.note(after)
        plan.outbox.extend(OutboxRow(uid, emitted) for emitted in decision.emitted)
        replaced = {*decision.cancelled, *decision.timeouts}
        plan.timeouts_cancelled.extend((uid, name) for name in sorted(replaced))
        plan.timeouts = [row for row in plan.timeouts if row.uid != uid or row.name not in replaced]
        plan.timeouts.extend(
            TimeoutRow(uid, name, armed.generation, armed.due_at, after.type, after.key)
            for name, armed in decision.timeouts.items()
        )
        for key in decision.correlated:
            plan.correlations.append(
                CorrelationRow(after.type, key.name, key.value, after.key, key.unique)
            )
            plan.woken.append((after.type, f"{key.name}={key.value}"))
            self.met.setdefault((after.type, key.name, key.value), []).append(after.key)
        if before is None or before.uid != uid:
            definition = self.catalog.definitions[after.type]
            plan.woken.append((after.type, f"{definition.key_field}={after.key}"))
        if after.status.finished and after.ledger.keys:
            plan.correlations = [
                row for row in plan.correlations if (row.saga_type, row.saga_key) != place
            ]
            plan.correlations_dropped.append(place)
            plan.correlations_past.extend(
                (after.type, name, value)
                for name, values in after.ledger.keys.items()
                for value in values
            )
            self.claims = {c: key for c, key in self.claims.items() if (c[0], key) != place}
        plan.transitions.append(_transition(envelope, before, after, decision))

    def replay_deferred(self, place: tuple[str, str]) -> None:
        """After a transition, early events that are handled now, in the order they came."""
        definition = self.catalog.definitions[place[0]]
        while (taken := take_deferred(definition, self.instances[place])) is not None:
            instance = self.instances[place]
            envelope, rest = taken
            try:
                message = self.catalog.decode(envelope)
                decision = self.decide(definition, rest, envelope, message, place)
            except Exception as error:  # noqa: BLE001 - as in `handle`
                # It left the instance; from here on it is a message that failed once.
                arrival = Arrival(
                    envelope=envelope,
                    consumer=f"{place[0]}#{place[1]}",
                    saga_type=place[0],
                    saga_key=place[1],
                    source=Source.PARKED,
                    parked_at=self.now,
                )
                self.note(msgspec.structs.replace(rest, version=rest.version + 1))
                text = _traceback(error)
                if isinstance(error, LimitExceeded | DecodeError):
                    self.dead(arrival, None, "failed", text, attempts=1)
                elif (
                    self.failed(arrival, self.instances[place], text, first=True) is Outcome.PARKED
                ):
                    return  # the later ones stay where they are until it is done
                continue
            after = decision.instance
            if after is None:
                after = msgspec.structs.replace(rest, version=rest.version + 1)
            self.apply(envelope, instance, decision, after)

    def missing(self, arrival: Arrival) -> Outcome:
        """No instance: the handler's policy decides."""
        if arrival.missing == "ignore":
            return Outcome.IGNORED
        waited = self.now - arrival.parked_at if arrival.parked_at else 0
        if arrival.missing == "dead-letter" or waited > self.catalog.retry.missing_us:
            text = f"no {arrival.saga_type} with {arrival.waits_for or arrival.saga_key}"
            if waited:
                text += f" appeared within {waited / 1e6:.0f} s"
            return self.dead(arrival, None, "missing", text)
        pause = min(max(waited // 4, 100_000), 5_000_000)
        self.park(arrival, due_at=self.now + pause, attempts=arrival.attempts, reason="missing")
        return Outcome.PARKED

    def failed(
        self, arrival: Arrival, instance: Instance | None, error: str, *, first: bool = False
    ) -> Outcome:
        """The handler raised: its effects are gone, the message is tried again later.

        It takes its place at the end of the instance's queue, or with `first` at the head.
        """
        attempts, retry = arrival.attempts + 1, self.catalog.retry
        if attempts >= retry.attempts_max:
            return self.dead(arrival, instance, "failed", error, attempts=attempts)
        due_at = retry.due_at(self.now, attempts, arrival.envelope.id, arrival.consumer)
        self.park(arrival, due_at=due_at, attempts=attempts, reason="retry", error=error)
        if instance is not None:
            self.enqueue(arrival, instance, first=first)
        return Outcome.PARKED

    def park_behind(self, arrival: Arrival, instance: Instance) -> Outcome:
        """Keeps the order of an instance whose earlier message failed."""
        limit = self.catalog.sender.limits.parked_max
        queue = instance.ledger.parked
        if len(queue) >= limit and _queued(arrival) not in queue:
            text = f"{limit} messages wait behind one that failed; expected fewer"
            return self.dead(arrival, instance, "failed", text)
        self.park(arrival, due_at=None, attempts=arrival.attempts, reason="behind")
        self.enqueue(arrival, instance)
        return Outcome.PARKED

    def park(
        self, arrival: Arrival, *, due_at: int | None, attempts: int, reason: str, error: str = ""
    ) -> None:
        self.plan.parked.append(
            ParkedRow(
                consumer=arrival.parks_as or arrival.consumer,
                message_id=arrival.envelope.id,
                saga_type=arrival.saga_type,
                saga_key=arrival.saga_key,
                lane=arrival.waits_for if reason == "missing" else "",
                due_at=due_at,
                attempts=attempts,
                parked_at=arrival.parked_at or self.now,
                reason=reason,
                error=error,
                envelope=arrival.envelope,
            )
        )

    def dead(
        self,
        arrival: Arrival,
        instance: Instance | None,
        reason: str,
        error: str,
        *,
        attempts: int = 0,
    ) -> Outcome:
        """Nobody will try it again, unless an operator does; what waits behind it goes on."""
        self.plan.dead_letters.append(
            DeadLetterRow(
                consumer=arrival.parks_as or arrival.consumer,
                message_id=arrival.envelope.id,
                topic=arrival.envelope.topic,
                message_type=arrival.envelope.type,
                reason=reason,
                error=error,
                attempts=attempts or arrival.attempts,
                entry=encode_entry(arrival.envelope),
                decoded=True,
                at=self.now,
                saga_type=arrival.saga_type,
                saga_key=arrival.saga_key,
                lane=arrival.waits_for if reason == "missing" else "",
            )
        )
        self.settled(arrival, instance)
        return Outcome.DEAD

    # ------------------------------------------------------------------- the queue of an instance

    def enqueue(self, arrival: Arrival, instance: Instance, *, first: bool = False) -> None:
        entry, queue = _queued(arrival), instance.ledger.parked
        if instance.status is Status.RUNNING and entry not in queue:
            longer = _with_parked(instance, (entry, *queue) if first else (*queue, entry))
            self.note(msgspec.structs.replace(longer, version=instance.version + 1))

    def dequeued(self, arrival: Arrival, instance: Instance) -> Instance:
        """`instance` without the message in its queue; behind the head the next one is due at once."""
        entry, queue = _queued(arrival), instance.ledger.parked
        if entry not in queue:
            return instance
        rest = tuple(other for other in queue if other != entry)
        if rest and queue[0] == entry:
            self.plan.released.append(rest[0])
        return _with_parked(instance, rest)

    def settled(self, arrival: Arrival, instance: Instance | None) -> None:
        """A message that changed nothing is done: what waited for it goes on."""
        if instance is None:
            return
        after = self.dequeued(arrival, instance)
        if after is not instance:
            self.note(msgspec.structs.replace(after, version=instance.version + 1))
            self.replay_deferred((after.type, after.key))

    def note(self, instance: Instance) -> None:
        place = (instance.type, instance.key)
        self.instances[place] = instance
        self.changed.add(place)

    def finish(self) -> Plan:
        """The rows of the instances, each once, with the version it had before the batch."""
        for place in sorted(self.changed):
            instance = self.instances[place]
            before = self.loaded.instances.get(place)
            if before is None:
                self.plan.saga_inserts.append(instance)
            else:
                self.plan.saga_updates.append((instance, before.version))
        return self.plan


def _queued(arrival: Arrival) -> tuple[str, str]:
    """Its place in the queue of an instance: what it is parked as."""
    return arrival.parks_as or arrival.consumer, arrival.envelope.id


def _at(arrival: Arrival, key: str) -> Arrival:
    """The same message at one more instance."""
    own = f"{arrival.saga_type}#{key}"
    return msgspec.structs.replace(
        arrival,
        saga_key=key,
        consumer=own if arrival.source is Source.BUS else arrival.consumer,
        parks_as=own,
    )


def _with_parked(instance: Instance, queue: tuple[tuple[str, str], ...]) -> Instance:
    ledger = msgspec.structs.replace(instance.ledger, parked=queue)
    return msgspec.structs.replace(instance, ledger=ledger)


def _traceback(error: BaseException) -> str:
    return _printable("".join(traceback.format_exception(error))[-20_000:])


def _printable(text: str) -> str:
    """`text` as every database takes it: no NUL, nothing that UTF-8 cannot encode."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


_effects = msgspec.json.Encoder()


def _transition(
    envelope: Envelope, before: Instance | None, after: Instance, decision: Decision
) -> TransitionRow:
    reborn = before is None or before.uid != after.uid
    effects: dict[str, object] = {}
    if decision.emitted:
        effects["sent"] = [
            [e.type, e.id, "undo" if e.undoes else "event" if not e.saga_uid else "command"]
            for e in decision.emitted
        ]
    if decision.timeouts:
        effects["timeouts"] = {name: armed.due_at for name, armed in decision.timeouts.items()}
    if decision.cancelled:
        effects["cancelled"] = list(decision.cancelled)
    if decision.correlated:
        effects["keys"] = [[key.name, key.value] for key in decision.correlated]
    if decision.deferred:
        effects["deferred"] = True
    if decision.reason:
        effects["reason"] = decision.reason
    return TransitionRow(
        uid=after.uid,
        version=after.version,
        saga_type=after.type,
        saga_key=after.key,
        at=after.updated_at,
        message_id=envelope.id,
        message_type=envelope.type,
        handler=decision.handler,
        state_from="" if before is None or reborn else before.state,
        state_to=after.state,
        status=str(after.status),
        correlation_id=after.ledger.correlation_id,
        effects=_effects.encode(effects),
        entry=encode_entry(envelope),
    )
