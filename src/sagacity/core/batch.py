"""`plan_batch`: a batch of messages, folded into the plan of one transaction. Pure."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping, Sequence

import msgspec

from sagacity.core.decide import (
    Decision,
    TimeoutDue,
    decide,
    decode_framework,
    is_control,
    take_deferred,
)
from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope, encode_entry
from sagacity.core.errors import DecodeError, KeyTaken, LimitExceeded
from sagacity.core.instance import Instance, Status
from sagacity.core.messages import Message
from sagacity.core.plan import (
    Arrival,
    CorrelationRow,
    DeadLetterRow,
    InboxRow,
    Known,
    Loaded,
    OutboxRow,
    Outcome,
    ParkedRow,
    Plan,
    Source,
    TimeoutRow,
    TransitionRow,
)
from sagacity.core.routing import Catalog


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
        self.armed: set[str] = set()
        """Instances (uid) that set timeouts in this batch."""
        self.met: dict[tuple[str, str, str], list[str]] = {}
        """(saga type, key name, value) -> instances that took up this key in this batch."""
        self.reached: set[tuple[str, str, str]] = set()
        """(message id, saga type, saga key) that have met, where messages are looked up."""
        self.looks_up = False

    def fold(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Handles each arrival in turn; the ones that found no instance once more at the end.

        No result may depend on which messages share a batch: a message also meets the instances that
        took up its key earlier in this batch, which the store could not know of.
        """
        self.looks_up = any(arrival.by is not None for arrival in arrivals)
        # A parked row that reaches several instances is taken over once, for all of them or none.
        held: Collection[tuple[str, str]] = self.loaded.busy and {
            (a.consumer, a.envelope.id)
            for a in arrivals
            if a.source is Source.PARKED and (a.saga_type, a.saga_key) in self.loaded.busy
        }
        outcomes = [
            Outcome.BUSY
            if held and a.source is Source.PARKED and (a.consumer, a.envelope.id) in held
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
        if not self.looks_up:
            return self.arrive(arrival) if arrival.saga_key else None
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
                if (arrival.consumer, message_id) in self.seen:
                    return False
                if not arrival.looked_up:
                    return True
                names = [arrival.saga_type]
                if not arrival.saga_key:
                    names.append(f"{arrival.saga_type}#")
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
        guards: Sequence[tuple[str, str]] = ()
        if arrival.source is Source.BUS:
            guards = ((arrival.consumer, arrival.envelope.id),)
            if arrival.looked_up and arrival.saga_key:
                guards = (*guards, (f"{arrival.saga_type}#", arrival.envelope.id))
        elif arrival.source is Source.PARKED:
            guards = arrival.guards
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
        if after.ledger.deferred:
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
        if not decision.correlated:
            return
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
        for emitted in decision.emitted:
            plan.outbox.append(OutboxRow(uid, emitted))
        if decision.cancelled or decision.timeouts:
            self.rearm(after, decision)
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

    def rearm(self, after: Instance, decision: Decision) -> None:
        """Timeouts of one instance that are replaced, cancelled or set."""
        plan, uid = self.plan, after.uid
        replaced = {*decision.cancelled, *decision.timeouts}
        plan.timeouts_cancelled.extend((uid, name) for name in sorted(replaced))
        if uid in self.armed:
            plan.timeouts = [
                row for row in plan.timeouts if row.uid != uid or row.name not in replaced
            ]
        self.armed.add(uid)
        plan.timeouts.extend(
            TimeoutRow(uid, name, armed.generation, armed.due_at, after.type, after.key)
            for name, armed in decision.timeouts.items()
        )

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
        queue = instance.ledger.parked
        if not queue or (entry := _queued(arrival)) not in queue:
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
