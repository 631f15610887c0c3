"""Drives the pure core with dictionaries for tables: what a store and a worker do, in a page.

`World` writes plans as strictly as a store does and checks, after each one, what must always hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from sagacity.core.batch import plan_batch
from sagacity.core.decide import Cancel, Limits, RetryUndo, Sender, WaiveUndo, decode_framework
from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope
from sagacity.core.errors import DecodeError
from sagacity.core.instance import Instance, Status, decode_ledger, encode_ledger
from sagacity.core.messages import (
    CommandDone,
    CommandFailed,
    Event,
    Message,
    encode_message,
    message_type,
)
from sagacity.core.plan import (
    Arrival,
    CorrelationRow,
    DeadLetterRow,
    InboxRow,
    Known,
    Loaded,
    Outcome,
    ParkedRow,
    Plan,
    Source,
    TimeoutRow,
    TransitionRow,
)
from sagacity.core.routing import (
    Catalog,
    Retry,
    Routed,
    arrivals_of,
    route,
    timeout_arrival,
)
from sagacity.core.saga import Saga

START = 1_800_000_000_000_000
SECOND = 1_000_000

Input = Envelope | ParkedRow | TimeoutRow


def definition_of(saga: type[Saga]) -> Definition:
    return saga.__definition__


def envelope_of(message: Message, message_id: str, **header: Any) -> Envelope:
    facts = message_type(message)
    return Envelope(
        id=message_id,
        type=facts.name,
        topic=facts.topic,
        version=facts.version,
        body=encode_message(message),
        **header,
    )


def reply_to(command: Envelope, message: Message, message_id: str = "") -> Envelope:
    """`message` as the answer of a participant to `command`."""
    return envelope_of(
        message,
        message_id or f"reply:{command.id}",
        saga_type=command.saga_type,
        saga_key=command.saga_key,
        saga_uid=command.saga_uid,
        in_reply_to=command.id,
        correlation_id=command.correlation_id,
        causation_id=command.id,
        hops=command.hops + 1,
    )


def done(command: Envelope) -> Envelope:
    return reply_to(command, CommandDone(command.id, command.type))


def failed(command: Envelope, reason: str = "no", *, refused: bool = False) -> Envelope:
    return reply_to(command, CommandFailed(command.id, command.type, reason, refused))


class World:
    """The tables of one service, and its time."""

    def __init__(
        self,
        *sagas: type[Saga],
        messages: Iterable[type[Message]] = (),
        limits: Limits | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.definitions = {s.__definition__.saga_type: s.__definition__ for s in sagas}
        self.classes: dict[str, type[Message]] = {message_type(cls).name: cls for cls in messages}
        for definition in self.definitions.values():
            for found in definition.routes.values():
                self.classes[message_type(found.event).name] = found.event
        self.catalog = Catalog(
            definitions=self.definitions,
            decode=self.decode,
            sender=Sender("tests", reply_to="tests.replies", limits=limits or Limits()),
            retry=retry or Retry(),
        )
        self.now = START
        self.instances: dict[tuple[str, str], Instance] = {}
        self.inbox: dict[tuple[str, str], Outcome] = {}
        self.outbox: list[tuple[str, Envelope]] = []
        self.timeouts: dict[tuple[str, str], TimeoutRow] = {}
        self.correlations: dict[tuple[str, str, str, str], CorrelationRow] = {}
        self.parked: dict[tuple[str, str], ParkedRow] = {}
        self.dead: list[DeadLetterRow] = []
        self.transitions: list[TransitionRow] = []
        self.busy: set[tuple[str, str]] = set()
        self.plans: list[Plan] = []

    def decode(self, envelope: Envelope) -> Message:
        ours = decode_framework(envelope)
        if ours is not None:
            return ours
        try:
            return msgspec.json.decode(envelope.body, type=self.classes[envelope.type])
        except (KeyError, msgspec.MsgspecError) as error:
            raise DecodeError(f"message {envelope.id}: {error}") from error

    # ------------------------------------------------------------------------------------ driving

    def deliver(self, *inputs: Input) -> list[Outcome]:
        """One batch: what became of each input at each of its instances."""
        arrivals = [arrival for one in inputs for arrival in self.arrivals(one)]
        places = {(a.saga_type, a.saga_key) for a in arrivals if a.saga_key}
        loaded = Loaded(
            instances={p: self.instances[p] for p in places - self.busy if p in self.instances},
            busy=places & self.busy,
        )
        guards = {guard for arrival in arrivals for guard in arrival.guards}
        known = Known(
            seen=guards & self.inbox.keys(),
            timeouts={(t.uid, t.name, t.generation) for t in self.timeouts.values()},
            parked={(a.consumer, a.envelope.id) for a in arrivals} & self.parked.keys(),
        )
        given = msgspec.msgpack.encode((list(loaded.instances.values()), sorted(known.timeouts)))
        plan, outcomes = plan_batch(self.catalog, arrivals, loaded, known, self.now)
        assert given == msgspec.msgpack.encode(
            (list(loaded.instances.values()), sorted(known.timeouts))
        )
        self.write(plan)
        return outcomes

    def arrivals(self, one: Input) -> list[Arrival]:
        if isinstance(one, TimeoutRow):
            return [
                timeout_arrival(
                    uid=one.uid,
                    name=one.name,
                    generation=one.generation,
                    due_at=one.due_at,
                    saga_type=one.saga_type,
                    saga_key=one.saga_key,
                )
            ]
        row = one if isinstance(one, ParkedRow) else None
        envelope = one if isinstance(one, Envelope) else one.envelope
        source = Source.BUS if row is None else Source.PARKED
        if row is not None and row.reason != "missing":
            definition = self.definitions[row.saga_type]
            routed = [Routed(definition, (row.saga_key,), None, "ignore", row.lane)]
        else:
            routed = route(self.catalog, envelope, "" if row is None else row.saga_type)
        return [
            arrival
            for each in routed
            for arrival in arrivals_of(each, self.keys(each), envelope, source=source, row=row)
        ]

    def keys(self, routed: Routed) -> Sequence[str]:
        if routed.lookup is None:
            return routed.keys
        wanted = (routed.definition.saga_type, *routed.lookup)
        return sorted({key for *place, key in self.correlations if tuple(place) == wanted})

    def due(self) -> list[Input]:
        parked = [r for r in self.parked.values() if r.due_at is not None and r.due_at <= self.now]
        return [
            *sorted(parked, key=lambda row: row.parked_at),
            *(row for row in self.timeouts.values() if row.due_at <= self.now),
        ]

    def settle(self) -> None:
        """Handles what is due, one at a time, until nothing is."""
        for _ in range(10_000):
            due = self.due()
            if not due:
                return
            self.deliver(due[0])
        raise AssertionError("it never settles")

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        self.settle()

    def converge(self) -> None:
        """Lets time pass until nothing is parked for a known time; timeouts are left alone."""
        for _ in range(1_000):
            self.settle()
            waiting = [r.due_at for r in self.parked.values() if r.due_at is not None]
            if not waiting:
                return
            self.now = max(self.now, *waiting) if len(waiting) == 1 else max(self.now, min(waiting))
        raise AssertionError("it never converges")

    # ------------------------------------------------------------------------------------ writing

    def write(self, plan: Plan) -> None:
        self.plans.append(plan)
        for instance in plan.saga_inserts:
            assert (instance.type, instance.key) not in self.instances, "lost start race"
            self._keep(instance)
        for instance, before in plan.saga_updates:
            assert self.instances[instance.type, instance.key].version == before
            assert instance.version > before
            self._keep(instance)
        for row in plan.inbox:
            self._accept(row)
        for place in plan.correlations_dropped:
            for key in [k for k in self.correlations if (k[0], k[3]) == place]:
                del self.correlations[key]
        for key_row in plan.correlations:
            self._correlate(key_row)
        for sent in plan.outbox:
            assert sent.envelope.id not in {e.id for _, e in self.outbox}, "an id was used twice"
            self.outbox.append((sent.lane, sent.envelope))
        for spot in plan.timeouts_cancelled:
            self.timeouts.pop(spot, None)
        for timeout in plan.timeouts:
            assert (timeout.uid, timeout.name) not in self.timeouts
            self.timeouts[timeout.uid, timeout.name] = timeout
        for guard in plan.unparked:
            del self.parked[guard]
        for parked in plan.parked:
            assert (parked.consumer, parked.message_id) not in self.parked
            self.parked[parked.consumer, parked.message_id] = parked
        for guard in plan.released:
            if guard in self.parked:
                self._release(guard)
        for saga_type, lane in plan.woken:
            for guard, parked in list(self.parked.items()):
                if (parked.saga_type, parked.lane) == (saga_type, lane):
                    self._release(guard)
        self.dead.extend(plan.dead_letters)
        self.transitions.extend(plan.transitions)
        self.check()

    def _keep(self, instance: Instance) -> None:
        ledger = decode_ledger(encode_ledger(instance.ledger))
        assert ledger == instance.ledger
        self.instances[instance.type, instance.key] = instance

    def _accept(self, row: InboxRow) -> None:
        assert (row.consumer, row.message_id) not in self.inbox, "taken twice"
        self.inbox[row.consumer, row.message_id] = row.outcome

    def _correlate(self, row: CorrelationRow) -> None:
        self.correlations[row.saga_type, row.name, row.value, row.saga_key] = row
        owners = {
            r.saga_key
            for r in self.correlations.values()
            if r.unique and (r.saga_type, r.name, r.value) == (row.saga_type, row.name, row.value)
        }
        assert len(owners) <= 1, "two owners of a unique key"

    def _release(self, guard: tuple[str, str]) -> None:
        self.parked[guard] = msgspec.structs.replace(self.parked[guard], due_at=self.now)

    def check(self) -> None:
        """What holds after every commit."""
        for instance in self.instances.values():
            ledger, waiting = instance.ledger, {e.id for e in instance.ledger.deferred}
            assert len(waiting) == len(ledger.deferred)
            for guard in ledger.parked:
                assert guard in self.parked, f"{guard} waits in no row"
            if ledger.parked:
                assert self.parked[ledger.parked[0]].due_at is not None, "the head never comes"
            armed = {(instance.uid, name) for name in ledger.timeouts}
            rows = {spot for spot in self.timeouts if spot[0] == instance.uid}
            assert rows <= armed, "a timeout row that the instance does not know"
            if instance.status is not Status.RUNNING:
                assert not ledger.deferred
                assert not ledger.timeouts
                assert not ledger.parked
            compensation = ledger.compensation
            if instance.status is Status.STUCK:
                assert compensation is not None
                assert compensation.failed
            if instance.status is Status.COMPENSATING:
                assert compensation is not None
                assert compensation.under_way
        alive = {instance.uid for instance in self.instances.values()}
        assert {uid for uid, _ in self.timeouts} <= alive
        stuck = [r for r in self.parked.values() if r.due_at is None]
        queues = {guard for i in self.instances.values() for guard in i.ledger.parked}
        assert {(r.consumer, r.message_id) for r in stuck} <= queues, "nobody will release it"

    # ------------------------------------------------------------------------------------ looking

    def one(self, key: str, saga_type: str = "") -> Instance:
        (found,) = [i for (t, k), i in self.instances.items() if k == key and saga_type in {"", t}]
        return found

    def saga(self, key: str, saga_type: str = "") -> Any:
        """The data of an instance, as the saga's handlers see it."""
        instance = self.one(key, saga_type)
        return self.definitions[instance.type].decode(instance.data)

    @property
    def sent(self) -> list[Envelope]:
        return [envelope for _, envelope in self.outbox]

    @property
    def sent_messages(self) -> list[str]:
        """The last part of the type names of what was sent, in order."""
        return [envelope.type.rpartition(".")[2] for envelope in self.sent]

    def last(self, name: str) -> Envelope:
        """The last message of a type that was sent."""
        return next(e for e in reversed(self.sent) if e.type.rpartition(".")[2] == name)

    def control(self, message: Cancel | RetryUndo | WaiveUndo, key: str) -> list[Outcome]:
        """An operator's word to an instance."""
        instance = self.one(key)
        return self.deliver(
            envelope_of(
                message,
                f"control:{len(self.inbox)}",
                saga_type=instance.type,
                saga_key=key,
                saga_uid=instance.uid,
            )
        )


class Numbered:
    """Makes envelopes with the ids e1, e2, ..."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: Event, **header: Any) -> Envelope:
        self.count += 1
        return envelope_of(event, f"e{self.count}", **header)
