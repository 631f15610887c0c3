"""`decide`: one message meets one saga instance. Everything else in the framework serves this.

    decide(definition, instance or None, envelope, message, now, sender) -> Decision

The same function is driven by the worker, by scenarios, by the simulation, by the checker and by
the console. It raises what the user's handler raises and changes nothing in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import msgspec

from sagacity.core.definition import Definition, Handler, Kind
from sagacity.core.delivery import HOPS_MAX, Envelope, derived_id
from sagacity.core.effects import CancelTimeout, Correlate, Encoded, Publish, Send, SetTimeout
from sagacity.core.errors import DecodeError, HandlerError, LimitExceeded
from sagacity.core.instance import (
    Armed,
    Compensation,
    Instance,
    Ledger,
    PendingCommand,
    Status,
    Undoable,
)
from sagacity.core.messages import (
    CommandDone,
    CommandFailed,
    Event,
    Message,
    MessageType,
    encode_message,
    message_type,
)
from sagacity.core.saga import Turn, run_handler


class TimeoutDue(Event, topic="sagacity.timeouts", name="sagacity.TimeoutDue"):
    """A timeout of a saga instance has come; never on the bus."""

    name: str
    generation: int


class Cancel(Event, topic="sagacity.control", name="sagacity.Cancel"):
    """An operator ends an instance: what it did is undone."""

    reason: str


class RetryUndo(Event, topic="sagacity.control", name="sagacity.RetryUndo"):
    """An operator has the failed undo commands of a stuck instance sent again."""

    reason: str = ""


class WaiveUndo(Event, topic="sagacity.control", name="sagacity.WaiveUndo"):
    """An operator takes the failed undo commands of a stuck instance as settled by hand."""

    reason: str


CONTROL: tuple[type[Event], ...] = (Cancel, RetryUndo, WaiveUndo)
FRAMEWORK: tuple[type[Event], ...] = (CommandDone, CommandFailed, TimeoutDue, *CONTROL)
"""Message types of our own that reach saga instances."""

# Looked up by class: isinstance says no only after the long way round through the metaclass.
_OWN_TYPES: frozenset[type[Message]] = frozenset(FRAMEWORK)
_CONTROL_TYPES: frozenset[type[Message]] = frozenset(CONTROL)
_CONTROL = frozenset(message_type(cls).name for cls in CONTROL)
_TIMEOUT = message_type(TimeoutDue).name


class Limits(msgspec.Struct, frozen=True):
    """How large one step, and one instance, may get; beyond that a step fails."""

    commands_max: int = 10_000
    """Messages one step may send."""
    timeouts_max: int = 1_000
    deferred_max: int = 1_000
    parked_max: int = 10_000
    state_bytes_max: int = 262_144
    payload_bytes_max: int = 262_144


class Sender(msgspec.Struct, frozen=True):
    """Who sends what the sagas of a service send, and where it listens."""

    service: str
    reply_to: str = ""
    reply_topics: tuple[str, ...] = ()
    limits: Limits = Limits()


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a message does to an instance."""

    handled: bool
    """False: nothing happened but perhaps that the message now waits in the instance."""
    deferred: bool = False
    missing: bool = False
    """True: there is no instance, and the message does not start one."""
    instance: Instance | None = None
    """The instance after, where anything changed."""
    handler: str = ""
    emitted: tuple[Envelope, ...] = ()
    """Commands and events to leave after commit, in order."""
    timeouts: dict[str, Armed] = {}
    cancelled: tuple[str, ...] = ()
    correlated: tuple[Correlate, ...] = ()
    reason: str = ""
    """Why it was ignored, or why the instance compensates."""


def trigger_of(envelope: Envelope, message: Message) -> tuple[Kind, str]:
    """Which rows of a transition table a message looks at."""
    if type(message) not in _OWN_TYPES:
        return "event", envelope.type
    match message:
        case TimeoutDue():
            return "timeout", message.name
        case CommandFailed():
            return "failure", message.command_type
        case CommandDone():
            return "done", message.command_type
        case _:
            return "event", envelope.type


def is_control(envelope: Envelope) -> bool:
    """True for an operator's word; it does not wait behind messages that failed."""
    return envelope.type in _CONTROL


def timeout_envelope(
    *, uid: str, name: str, generation: int, due_at: int, saga_type: str, saga_key: str
) -> Envelope:
    """The message a due timeout becomes. Its id is the same however often the clock finds it."""
    return Envelope(
        id=f"timeout:{derived_id(uid, name, str(generation))}",
        type=_TIMEOUT,
        topic=message_type(TimeoutDue).topic,
        body=encode_message(TimeoutDue(name, generation)),
        time=due_at,
        saga_type=saga_type,
        saga_key=saga_key,
        saga_uid=uid,
    )


def decide(
    definition: Definition,
    instance: Instance | None,
    envelope: Envelope,
    message: Message,
    now: int,
    sender: Sender,
    *,
    key: str = "",
) -> Decision:
    """What `message` does to `instance`; `now` is in microseconds.

    `key` names the instance a start event creates. Raises what the handler raises, `HandlerError`
    for a broken rule, `LimitExceeded` for a step that is too large. `message` may be changed by the
    handler and must not be used again.
    """
    kind, trigger = trigger_of(envelope, message)
    start = definition.starts.get(trigger) if kind == "event" else None
    # Among the instances of one saga, a reply is for the one that asked and for no other. To another
    # saga it is an event like any other.
    reply_to_us = bool(envelope.saga_uid) and envelope.saga_type in {"", definition.saga_type}
    if instance is None:
        if start is None or reply_to_us:
            return Decision(handled=False, missing=True, reason="no instance")
        unborn = _unborn(definition, key, envelope, now)
        return _Step(definition, unborn, envelope, now, sender).run(start, message)
    if reply_to_us and envelope.saga_uid != instance.uid:
        return Decision(handled=False, reason="meant for an earlier instance of this key")
    if instance.status.finished:
        if start is None or not definition.restartable or reply_to_us:
            return Decision(handled=False, reason=f"instance is {instance.status}")
        unborn = _unborn(definition, instance.key, envelope, now)
        reborn = msgspec.structs.replace(unborn, version=instance.version)
        return _Step(definition, reborn, envelope, now, sender).run(start, message)

    step = _Step(definition, instance, envelope, now, sender)
    if type(message) in _CONTROL_TYPES:
        return step.control(message)
    if kind == "timeout" and not step.armed_as(cast("TimeoutDue", message)):
        return Decision(handled=False, reason="stale timeout")
    answers = step.answers()
    if kind in {"done", "failure"} and not answers:
        return Decision(handled=False, reason="answers no command that is pending")
    if instance.status is not Status.RUNNING:
        if not answers:
            return Decision(handled=False, reason=f"instance is {instance.status}")
        step.answer(envelope, message)
        step.go_on_compensating()
        return step.decision("")
    step.check_known()
    handler = definition.handler(instance.state, kind, trigger)
    if handler is None and definition.waits(instance.state, kind, trigger):
        # Its command stays pending and its timeout armed, so that nobody takes it for dealt with.
        return step.defer()
    if answers:
        step.answer(envelope, message)
    if kind == "timeout":
        step.fire(cast("TimeoutDue", message))
    if handler is not None:
        return step.run(handler, message)
    if kind == "failure":
        step.compensate(f"{trigger} failed: {cast('CommandFailed', message).reason}")
        return step.decision("")
    if answers or kind == "timeout":
        return step.decision("")
    return Decision(handled=False, reason=f"not expected in state {instance.state!r}")


def replay(
    definition: Definition,
    key: str,
    history: Iterable[tuple[int, int, Envelope]],
    decode: Callable[[Envelope], Message],
    sender: Sender,
) -> Instance | None:
    """The instance that a history leads to, from nothing; None for an empty one.

    `history` is (version, time, envelope) of each of its transitions in order of version. Handlers
    run again, but nothing leaves. The queue of parked messages is no part of a history.
    """
    instance: Instance | None = None
    for version, at, envelope in history:
        if instance is not None:
            waiting = tuple(e for e in instance.ledger.deferred if e.id != envelope.id)
            ledger = msgspec.structs.replace(instance.ledger, deferred=waiting)
            instance = msgspec.structs.replace(instance, version=version - 1, ledger=ledger)
        decision = decide(definition, instance, envelope, decode(envelope), at, sender, key=key)
        if decision.instance is not None:
            instance = decision.instance
        elif instance is not None:
            instance = msgspec.structs.replace(instance, version=version)
    return instance


def take_deferred(definition: Definition, instance: Instance) -> tuple[Envelope, Instance] | None:
    """The first waiting message that need not wait longer, and the instance without it.

    That is one that the present state handles, or that no state reachable from here does.
    """
    if instance.status is not Status.RUNNING or instance.state not in definition.states:
        return None
    for index, envelope in enumerate(instance.ledger.deferred):
        kind, trigger = _deferred_trigger(envelope)
        if definition.handler(instance.state, kind, trigger) is not None or not definition.waits(
            instance.state, kind, trigger
        ):
            rest = instance.ledger.deferred[:index] + instance.ledger.deferred[index + 1 :]
            ledger = msgspec.structs.replace(instance.ledger, deferred=rest)
            return envelope, msgspec.structs.replace(instance, ledger=ledger)
    return None


_framework_decoders = {message_type(cls).name: msgspec.json.Decoder(cls) for cls in FRAMEWORK}


def _deferred_trigger(envelope: Envelope) -> tuple[Kind, str]:
    decoder = _framework_decoders.get(envelope.type)
    return (
        ("event", envelope.type)
        if decoder is None
        else trigger_of(envelope, decoder.decode(envelope.body))
    )


def decode_framework(envelope: Envelope) -> Message | None:
    """The message of an envelope of our own types, or None. Raises DecodeError."""
    decoder = _framework_decoders.get(envelope.type)
    if decoder is None:
        return None
    try:
        return decoder.decode(envelope.body)
    except Exception as error:
        raise DecodeError(f"message {envelope.id} of type {envelope.type}: {error}") from error


def _unborn(definition: Definition, key: str, envelope: Envelope, now: int) -> Instance:
    """The instance a start event finds: version 0, in no state yet."""
    return Instance(
        type=definition.saga_type,
        key=key,
        uid=derived_id(definition.saga_type, key, envelope.id),
        version=0,
        status=Status.RUNNING,
        state="",
        schema_version=definition.version,
        data=b"",
        ledger=Ledger(
            correlation_id=envelope.correlation_id or envelope.id,
            actor=envelope.actor,
            hops=envelope.hops,
        ),
        started_at=now,
        updated_at=now,
    )


class _Step:
    """The instance while one message is applied to it: mutable parts, frozen again at the end."""

    def __init__(
        self,
        definition: Definition,
        instance: Instance,
        envelope: Envelope,
        now: int,
        sender: Sender,
    ) -> None:
        self.definition, self.before = definition, instance
        self.envelope, self.now, self.sender = envelope, now, sender
        ledger = instance.ledger
        self.status, self.state, self.data = instance.status, instance.state, instance.data
        self.pending = dict(ledger.pending)
        self.undo = list(ledger.undo)
        self.deferred = ledger.deferred
        self.armed = dict(ledger.timeouts)
        self.generation = ledger.generation
        self.keys = dict(ledger.keys)
        self.sequence = dict(ledger.sequence)
        self.schema_version = instance.schema_version
        self.compensation: Compensation | None = ledger.compensation
        self.emitted: list[Envelope] = []
        self.set: dict[str, Armed] = {}
        self.cancelled: list[str] = []
        self.correlated: list[Correlate] = []
        self.reason = ""

    # ----------------------------------------------------------------------- answers and timeouts

    def armed_as(self, message: TimeoutDue) -> bool:
        """False for a timeout that was set anew or cancelled since."""
        armed = self.armed.get(message.name)
        return armed is not None and armed.generation == message.generation

    def fire(self, message: TimeoutDue) -> None:
        """Disarms a timeout whose time has come."""
        del self.armed[message.name]

    def answers(self) -> bool:
        """True where the message answers a command that is pending."""
        return self.envelope.in_reply_to in self.pending

    def answer(self, envelope: Envelope, message: Message | None) -> None:
        """Takes note that a command was answered, if it is pending."""
        command_id = envelope.in_reply_to
        pending = self.pending.pop(command_id, None)
        if pending is None:
            return
        if pending.undoes:
            self._undo_answered(command_id, message)
        elif type(message) is CommandFailed:
            if message.refused:
                self._refused(command_id)
        else:
            self.undo = [
                msgspec.structs.replace(entry, confirmed=True)
                if entry.command_id == command_id
                else entry
                for entry in self.undo
            ]

    def _refused(self, command_id: str) -> None:
        """A command that certainly had no effect needs no undo."""
        self.undo = [entry for entry in self.undo if entry.command_id != command_id]
        if (compensation := self.compensation) is not None:
            needless = {k for k, e in compensation.failed.items() if e.command_id == command_id}
            self.compensation = msgspec.structs.replace(
                compensation,
                remaining=tuple(e for e in compensation.remaining if e.command_id != command_id),
                failed={k: e for k, e in compensation.failed.items() if k not in needless},
                errors={k: e for k, e in compensation.errors.items() if k not in needless},
            )

    def _undo_answered(self, undo_id: str, message: Message | None) -> None:
        compensation = self.compensation
        if compensation is None or undo_id not in compensation.under_way:
            return
        under_way = dict(compensation.under_way)
        entry = under_way.pop(undo_id)
        failed, errors = dict(compensation.failed), dict(compensation.errors)
        # Meanwhile the command itself may have been refused: then there was nothing to undo.
        needed = any(entry.command_id == other.command_id for other in self.undo)
        if isinstance(message, CommandFailed) and needed:
            failed[undo_id] = entry
            errors[undo_id] = message.reason
        self.compensation = msgspec.structs.replace(
            compensation, under_way=under_way, failed=failed, errors=errors
        )

    def defer(self) -> Decision:
        """Keeps an early event in the instance until a state handles it."""
        limit = self.sender.limits.deferred_max
        if len(self.deferred) >= limit:
            raise LimitExceeded(
                f"{self.definition.saga_type} {self.before.key!r} in state {self.state!r}: {limit} early events wait "
                f"already; expected fewer; {self.envelope.type} is handled later or ignored with ignore()"
            )
        self.deferred = (*self.deferred, self.envelope)
        return msgspec.structs.replace(self.decision(""), handled=False, deferred=True)

    # ----------------------------------------------------------------------------------- handlers

    def check_known(self) -> None:
        """Raises HandlerError for an instance that this code does not understand."""
        definition, before = self.definition, self.before
        if before.schema_version > definition.version:
            raise HandlerError(
                f"{definition.saga_type} {before.key!r} was stored by version {before.schema_version} of "
                f"the class; expected {definition.version} or older; this worker runs older code"
            )
        if before.state not in definition.states:
            raise HandlerError(
                f"{definition.saga_type} {before.key!r} is stored in state {before.state!r}; expected one "
                f"of {', '.join(definition.states)}; keep the old state in the class until no instance "
                "is in it"
            )

    def run(self, handler: Handler, message: Message) -> Decision:
        """Calls the handler and gives its effects their meaning."""
        definition, before = self.definition, self.before
        saga = definition.decode(before.data) if before.data else definition.new(before.key)
        turn = Turn(
            definition,
            self.envelope,
            self.now,
            key=before.key,
            uid=before.uid,
            state=self.state,
            targets=handler.targets(self.state),
            pending=self.pending,
        )
        run_handler(saga, turn, handler.function, message, takes=handler.takes)
        self.state = self._next_state(handler, turn)
        self.data = definition.encode(saga)
        self.schema_version = definition.version
        for effect in turn.effects:
            match effect:
                case Send():
                    self._send(effect)
                case Publish():
                    self._emit(effect.event, effect.message_id, addressed=False)
                case SetTimeout():
                    self._arm(effect)
                case CancelTimeout():
                    self._disarm(effect.name)
                case Correlate():
                    self._correlate(effect)
        if turn.compensation is not None:
            self.compensate(turn.compensation)
        return self.decision(handler.name)

    def _next_state(self, handler: Handler, turn: Turn) -> str:
        if turn.goto is not None:
            return turn.goto
        if len(handler.goto) == 1:
            return handler.goto[0]
        if not handler.goto or self.state in handler.goto:
            return self.state
        raise HandlerError(
            f"{turn.where()}: handler {handler.name} ({handler.location}) did not say where to go; "
            f"expected a self.goto to one of {', '.join(handler.goto)}"
        )

    def _send(self, effect: Send) -> None:
        facts, undo, command_id = effect.command.type, effect.undo, effect.command_id
        number = self.sequence[facts.topic] = self.sequence.get(facts.topic, 0) + 1
        self._emit(effect.command, command_id, addressed=True, sequence=number)
        self.pending[command_id] = PendingCommand(command_id, facts.name, facts.topic, self.now)
        if undo is not None:
            self._check_size(undo)
            self.undo.append(
                Undoable(
                    command_id,
                    facts.name,
                    facts.topic,
                    undo.type.name,
                    undo.type.version,
                    undo.body,
                )
            )

    def _check_size(self, message: Encoded) -> None:
        limit = self.sender.limits.payload_bytes_max
        if len(message.body) > limit:
            raise LimitExceeded(
                f"{self.before.type} {self.before.key!r}: {message.type.name} has {len(message.body)} "
                f"bytes; expected at most {limit}; send a reference to the data"
            )

    def _emit(
        self, message: Encoded, message_id: str, *, addressed: bool, sequence: int = 0
    ) -> None:
        before, facts, limit = self.before, message.type, self.sender.limits.commands_max
        self._check_size(message)
        if len(self.emitted) >= limit:
            raise LimitExceeded(
                f"{before.type} {before.key!r}: one step sends more than {limit} messages; expected "
                "fewer; send one command for many of them, or go in several steps"
            )
        if self.hops > HOPS_MAX:
            raise LimitExceeded(
                f"{before.type} {before.key!r}: {facts.name} would be hop {self.hops}; expected at most "
                f"{HOPS_MAX}; sagas that start or answer each other in a circle never end"
            )
        self.emitted.append(
            self._command(facts, message.body, message_id, sequence=sequence)
            if addressed
            else self._event(facts, message.body, message_id)
        )

    def _emit_undo(self, undo_id: str, entry: Undoable) -> None:
        """No limit applies: what was done must be undone."""
        facts = MessageType(entry.undo_type, entry.topic, entry.undo_version, "command", "")
        undo = self._command(facts, entry.undo_body, undo_id, undoes=entry.command_id)
        self.emitted.append(undo)

    @property
    def hops(self) -> int:
        """A reply to this instance, or its timeout, goes on where it started; anything else is a
        hop further.
        """
        before, cause = self.before.ledger, self.envelope
        own = cause.type == _TIMEOUT or (cause.in_reply_to and cause.saga_uid == self.before.uid)
        return 1 + (before.hops if own else max(before.hops, cause.hops))

    def _event(self, facts: MessageType, body: bytes, message_id: str) -> Envelope:
        ledger = self.before.ledger
        return Envelope(
            id=message_id,
            type=facts.name,
            topic=facts.topic,
            version=facts.version,
            body=body,
            time=self.now,
            source=self.sender.service,
            correlation_id=ledger.correlation_id,
            causation_id=self.envelope.id,
            actor=ledger.actor,
            hops=self.hops,
        )

    def _command(
        self,
        facts: MessageType,
        body: bytes,
        message_id: str,
        *,
        sequence: int = 0,
        undoes: str = "",
    ) -> Envelope:
        """A command carries the return address."""
        before, sender, ledger = self.before, self.sender, self.before.ledger
        return Envelope(
            id=message_id,
            type=facts.name,
            topic=facts.topic,
            version=facts.version,
            body=body,
            kind="command",
            time=self.now,
            source=sender.service,
            correlation_id=ledger.correlation_id,
            causation_id=self.envelope.id,
            actor=ledger.actor,
            hops=min(self.hops, HOPS_MAX),
            saga_type=before.type,
            saga_key=before.key,
            saga_uid=before.uid,
            reply_to=sender.reply_to,
            reply_topics=sender.reply_topics,
            sequence=sequence,
            undoes=undoes,
        )

    def _arm(self, effect: SetTimeout) -> None:
        self.generation += 1
        armed = Armed(self.generation, effect.due_at)
        self.armed[effect.name] = self.set[effect.name] = armed
        if len(self.armed) > self.sender.limits.timeouts_max:
            raise LimitExceeded(
                f"{self.before.type} {self.before.key!r}: more than {self.sender.limits.timeouts_max} timeouts"
            )

    def _disarm(self, name: str) -> None:
        self.set.pop(name, None)
        if self.armed.pop(name, None) is not None:
            self.cancelled.append(name)

    def _correlate(self, effect: Correlate) -> None:
        values = self.keys.get(effect.name, ())
        if effect.value not in values:
            self.keys[effect.name] = (*values, effect.value)
            self.correlated.append(effect)

    # ------------------------------------------------------------------------------- compensation

    def compensate(self, reason: str) -> None:
        """Starts to undo: forward handling stops, timeouts are disarmed, early events dropped.

        Answers among the early ones still say what was refused, and so need not be undone.
        """
        for envelope in self.deferred:
            self.answer(envelope, decode_framework(envelope))
        self.reason = reason
        self.status = Status.COMPENSATING
        self.compensation = Compensation(reason=reason, remaining=tuple(self.undo))
        self.deferred = ()
        for name in list(self.armed):
            self._disarm(name)
        self.go_on_compensating()

    def go_on_compensating(self) -> None:
        """Sends the next undo, or all of them; finds out whether all is done, or stuck.

        Newest first, each after the one before it was confirmed (Garcia-Molina and Salem 1987);
        what failed for good stops the sequence, because what lies deeper may rest on it.
        """
        compensation = self.compensation
        assert compensation is not None
        remaining, under_way = list(compensation.remaining), dict(compensation.under_way)
        together = self.sender.limits.commands_max if self.definition.parallel else 1
        while remaining and not compensation.failed and len(under_way) < together:
            entry = remaining.pop()
            undo_id = derived_id(
                self.before.uid, entry.command_id, "undo", str(compensation.attempt)
            )
            self._emit_undo(undo_id, entry)
            self.pending[undo_id] = PendingCommand(
                undo_id, entry.undo_type, entry.topic, self.now, undoes=entry.command_id
            )
            under_way[undo_id] = entry
        self.compensation = msgspec.structs.replace(
            compensation, remaining=tuple(remaining), under_way=under_way
        )
        if under_way:
            self.status = Status.COMPENSATING
        elif compensation.failed:
            self.status = Status.STUCK
        elif not remaining:
            self.status = Status.COMPENSATED

    def control(self, message: Message) -> Decision:
        """An operator's word."""
        compensation = self.compensation
        match message:
            case Cancel(reason=reason) if compensation is None:
                self.compensate(f"cancelled: {reason}")
                return self.decision("")
            case RetryUndo(reason=reason) if compensation is not None and compensation.failed:
                self.reason = reason
                place = {entry.command_id: number for number, entry in enumerate(self.undo)}
                left = [*compensation.remaining, *compensation.failed.values()]
                self.compensation = msgspec.structs.replace(
                    compensation,
                    remaining=tuple(
                        sorted(left, key=lambda entry: place.get(entry.command_id, -1))
                    ),
                    failed={},
                    errors={},
                    attempt=compensation.attempt + 1,
                )
            case WaiveUndo(reason=reason) if compensation is not None and compensation.failed:
                self.reason = reason
                waived = {entry.command_id: reason for entry in compensation.failed.values()}
                self.compensation = msgspec.structs.replace(
                    compensation, failed={}, errors={}, waived={**compensation.waived, **waived}
                )
            case _:
                return Decision(
                    handled=False,
                    reason=f"{type(message).__name__} does not apply to an instance that is {self.status}",
                )
        self.go_on_compensating()
        return self.decision("")

    # ----------------------------------------------------------------------------------- the end

    def decision(self, handler: str) -> Decision:
        """Freezes the step."""
        definition, before = self.definition, self.before
        if self.status is Status.RUNNING and self.state in definition.final:
            self.status = Status.COMPLETED
        if self.status.finished:
            for name in list(self.armed):
                self._disarm(name)
            self.deferred = ()
        ledger = msgspec.structs.replace(
            before.ledger,
            pending=self.pending,
            undo=tuple(self.undo),
            deferred=self.deferred,
            timeouts=self.armed,
            generation=self.generation,
            keys=self.keys,
            sequence=self.sequence,
            compensation=self.compensation,
            steps=before.ledger.steps + 1,
        )
        size = len(self.data)
        if size > self.sender.limits.state_bytes_max:
            raise LimitExceeded(
                f"{before.type} {before.key!r}: the data has {size} bytes; expected at most "
                f"{self.sender.limits.state_bytes_max}; keep a reference instead"
            )
        after = msgspec.structs.replace(
            before,
            version=before.version + 1,
            status=self.status,
            state=self.state,
            schema_version=self.schema_version,
            data=self.data,
            ledger=ledger,
            updated_at=self.now,
        )
        return Decision(
            handled=True,
            instance=after,
            handler=handler,
            emitted=tuple(self.emitted),
            timeouts=self.set,
            cancelled=tuple(self.cancelled),
            correlated=tuple(self.correlated),
            reason=self.reason,
        )
