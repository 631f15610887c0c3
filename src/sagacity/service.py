"""What one consumer group runs: sagas, command handlers and subscribers, under one name.

A service is a declaration. It opens nothing and listens to nothing; ``saga-worker`` does that, or
`sagacity.testing.Inline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, overload
from uuid import uuid4

import msgspec

from sagacity.codec import Registry, Upcaster, moment
from sagacity.core.decide import FRAMEWORK, Sender, decode_framework
from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope, checked_id, derived_id, enveloped
from sagacity.core.errors import DecodeError, DefinitionError
from sagacity.core.messages import (
    Command,
    CommandDone,
    CommandFailed,
    Event,
    Message,
    caller_location,
    encode_message,
    message_type,
)
from sagacity.core.plan import OutboxRow, ParkedRow
from sagacity.core.routing import Catalog, Retry
from sagacity.core.saga import Saga, key_text
from sagacity.recording import Mode, Origin, Subscriber, current_origin, recording_now

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

C = TypeVar("C", bound=Command)
E = TypeVar("E", bound=Event)

Reply = Event | Iterable[Event] | None
"""What a command handler returns: an event, several, or nothing, which means "done"."""

_PARTICIPANT = "__sagacity_participant__"


class Context:
    """What a participant may use besides its message.

    `session` is the user's database session: what it writes commits together with the outbox and
    with the note that this message is done. Do slow I/O before its first use: from then on a
    transaction is open.
    """

    def __init__(
        self,
        envelope: Envelope,
        *,
        attempt: int,
        now: int,
        source: str,
        session: Callable[[], Any],
        state: Any,
    ) -> None:
        self.envelope, self.attempt, self.state = envelope, attempt, state
        self._now, self._session = now, session
        self.origin = Origin.following(envelope, source=source)
        self.outgoing: list[Message] = []

    @property
    def session(self) -> AsyncSession:
        """The session of this message's transaction; begun on first use."""
        return cast("AsyncSession", self._session())

    @property
    def command_id(self) -> str:
        """Id of the message: the same with every attempt, so the idempotency key for remote calls."""
        return self.envelope.id

    @property
    def message_id(self) -> str:
        """Id of the message; another name of `command_id` for subscribers."""
        return self.envelope.id

    @property
    def now(self) -> datetime:
        """The store's time when this attempt began, aware, in UTC."""
        return moment(self._now)

    def send(self, command: Command) -> None:
        """Sends a follow-up command after commit. It is queued, never nested."""
        self._go(command, Command, "publish")

    def publish(self, event: Event) -> None:
        """Publishes an event after commit that is not the reply."""
        self._go(event, Event, "send")

    def _go(self, message: Message, kind: type[Message], other: str) -> None:
        if not isinstance(message, kind):
            raise TypeError(
                f"expected a {kind.__name__.lower()}, got {type(message).__name__}; see context.{other}"
            )
        encode_message(message)
        self.outgoing.append(message)


class _CommandHandler(Protocol[C]):
    @overload
    def __call__(
        self, function: Callable[[C], Awaitable[Reply]], /
    ) -> Callable[[C], Awaitable[Reply]]: ...
    @overload
    def __call__(
        self, function: Callable[[C, Context], Awaitable[Reply]], /
    ) -> Callable[[C, Context], Awaitable[Reply]]: ...
    @overload
    def __call__(
        self, function: Callable[[Any, C, Context], Awaitable[Reply]], /
    ) -> Callable[[Any, C, Context], Awaitable[Reply]]: ...


class _EventSubscriber(Protocol[E]):
    @overload
    def __call__(self, function: Callable[[E], Any], /) -> Callable[[E], Any]: ...
    @overload
    def __call__(self, function: Callable[[E, Context], Any], /) -> Callable[[E, Context], Any]: ...
    @overload
    def __call__(
        self, function: Callable[[Any, E, Context], Any], /
    ) -> Callable[[Any, E, Context], Any]: ...


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """A command handler or a durable subscriber."""

    kind: Literal["command", "subscriber"]
    message: type[Message]
    function: Callable[..., Awaitable[Any]]
    name: str
    location: str
    takes_context: bool = False
    retry: Retry | None = None
    timeout: timedelta | None = None
    concurrency: int | None = None


class _Answer(Event, topic="sagacity.control", name="sagacity.Answer"):
    """What is left of a reply whose type is not known here: that it came."""


_ANSWER = _Answer()


class _Mark(msgspec.Struct, frozen=True, kw_only=True):
    """What a decorator says about a function."""

    messages: tuple[type[Message], ...]
    kind: Literal["command", "subscriber"]
    mode: Mode
    name: str
    location: str
    retry: Retry | None
    timeout: timedelta | None
    concurrency: int | None


def handles(
    *commands: type[C],
    retry: Retry | None = None,
    timeout: timedelta | None = None,
    concurrency: int | None = None,
) -> _CommandHandler[C]:
    """Marks the one function that does what a command says.

    It is ``async def``, takes the command and, if it likes, a `Context`, does the I/O, and returns
    the reply: an event, several, or nothing. `Refused` is a permanent no; any other exception has it
    tried again as `retry` says (default: the worker's settings), and then becomes a failure.
    `timeout` limits one attempt; `concurrency` limits how many run at once in one process.

    Handlers must be idempotent by ``context.command_id``: they may run more than once.
    """
    return cast(
        "_CommandHandler[C]",
        _mark("command", commands, Mode.DURABLE, "", retry, timeout, concurrency),
    )


def subscribes(
    *events: type[E],
    mode: Mode | Literal["durable", "in_transaction", "after_commit"] = Mode.DURABLE,
    name: str = "",
    retry: Retry | None = None,
    timeout: timedelta | None = None,
    concurrency: int | None = None,
) -> _EventSubscriber[E]:
    """Marks a function that is called for each event of these classes, subclasses included.

    `mode` is ``durable`` (over the bus, until it succeeds), ``in_transaction`` (inside the
    publisher's transaction, may veto; same database only) or ``after_commit`` (lossy). `name` names
    the subscriber in the inbox; it must stay the same for as long as messages are kept.
    """
    return cast(
        "_EventSubscriber[E]",
        _mark("subscriber", events, Mode(mode), name, retry, timeout, concurrency),
    )


def _mark(
    kind: Literal["command", "subscriber"],
    messages: tuple[type[Message], ...],
    mode: Mode,
    name: str,
    retry: Retry | None,
    timeout: timedelta | None,
    concurrency: int | None,
) -> Callable[[Any], Any]:
    location = caller_location(2)
    wanted: type[Message] = Command if kind == "command" else Event
    decorator = "handles" if kind == "command" else "subscribes"
    given: tuple[object, ...] = messages
    for message in given:
        if not (isinstance(message, type) and issubclass(message, wanted)):
            raise DefinitionError(
                f"@{decorator} expects {wanted.__name__} classes, got {message!r}", location
            )
    if not messages:
        raise DefinitionError(f"@{decorator} needs a {wanted.__name__} class, got none", location)
    if concurrency is not None and concurrency < 1:
        raise DefinitionError(
            f"@{decorator}: expected concurrency of 1 or more, got {concurrency}", location
        )

    def mark(function: Any) -> Any:
        if mode is Mode.DURABLE and not inspect.iscoroutinefunction(function):
            raise DefinitionError(
                f"@{decorator}: {function.__qualname__} is not async; expected async def", location
            )
        setattr(
            function,
            _PARTICIPANT,
            _Mark(
                messages=messages,
                kind=kind,
                mode=mode,
                name=name or function.__name__,
                location=location,
                retry=retry,
                timeout=timeout,
                concurrency=concurrency,
            ),
        )
        return function

    return mark


class Appends(Protocol):
    """A session of ours: takes messages into its transaction."""

    async def append_envelopes(self, rows: Sequence[OutboxRow]) -> None:
        """Writes the rows into the outbox, in the caller's transaction."""
        ...


Lifespan = Callable[["Service"], AbstractAsyncContextManager[Any]]


class Service:
    """One consumer group: its name, its sagas, and what it does when messages arrive.

    `handlers` are functions (or bound methods) marked with `handles` or `subscribes`. `messages`
    makes further message classes known. `upcasters` maps (type name, version) to a function from
    that version's fields to the next one's. `lifespan` is an async context manager entered for each
    worker; what it yields is ``context.state`` of every participant.

    Raises DefinitionError, with file and line, for two handlers of one command, two messages of one
    name, a handler that is not marked, or an undo that nobody handles.
    """

    def __init__(
        self,
        name: str,
        *,
        sagas: Iterable[type[Saga]] = (),
        handlers: Iterable[Callable[..., Any]] = (),
        messages: Iterable[type[Message]] = (),
        upcasters: Mapping[tuple[str, int], Upcaster] | None = None,
        lifespan: Lifespan | None = None,
    ) -> None:
        self.location = caller_location(1)
        try:
            self.name = checked_id(name, "service name")
        except DecodeError as error:
            raise DefinitionError(str(error), self.location) from error
        self.lifespan = lifespan
        self.registry = Registry(FRAMEWORK, upcasters)
        self.sagas: dict[str, Definition] = {}
        self.commands: dict[str, Participant] = {}
        self.subscribers: dict[str, Participant] = {}
        self.local_subscribers: list[Subscriber] = []
        self._subscribed: dict[str, list[Participant]] = {}
        for saga in sagas:
            self._add_saga(saga)
        for handler in handlers:
            self._add_handler(handler)
        for message in messages:
            self.registry.add(message)
        self._check_undo()
        self.reply_topic = f"{name}.replies" if self.sagas else ""
        self.command_topics = frozenset(
            message_type(participant.message).topic for participant in self.commands.values()
        )
        self.topics = frozenset(
            {
                message_type(route.event).topic
                for d in self.sagas.values()
                for route in d.routes.values()
            }
            | self.command_topics
            | {self._topic(name) for name in self._subscribed}
            | ({self.reply_topic} if self.reply_topic else set())
        )

    # ------------------------------------------------------------------------------------ building

    def _fail(self, text: str, location: str = "") -> DefinitionError:
        return DefinitionError(f"service {self.name}: {text}", location or self.location)

    def _topic(self, type_name: str) -> str:
        cls = self.registry.get(type_name)
        assert cls is not None
        return message_type(cls).topic

    def _add_saga(self, saga: object) -> None:
        definition: object = getattr(saga, "__dict__", {}).get("__definition__")
        if not isinstance(definition, Definition):
            raise self._fail(f"expected Saga subclasses, got {saga!r}")
        if definition.saga_type in self.sagas:
            raise self._fail(f"saga {definition.saga_type!r} is there twice", definition.location)
        self.sagas[definition.saga_type] = definition
        for route in definition.routes.values():
            self.registry.add(route.event)

    def _add_handler(self, function: Callable[..., Any]) -> None:
        mark = getattr(function, _PARTICIPANT, None)
        if not isinstance(mark, _Mark):
            name = getattr(function, "__qualname__", repr(function))
            raise self._fail(
                f"{name} is no handler; expected a function with @handles or @subscribes"
            )
        if mark.mode is not Mode.DURABLE:
            self.local_subscribers.extend(
                Subscriber(
                    event=cast("type[Event]", message),
                    function=function,
                    mode=mark.mode,
                    name=f"{self.name}.{mark.name}",
                    location=mark.location,
                )
                for message in mark.messages
            )
            return
        parameters = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
        if len(parameters) not in (1, 2):
            raise self._fail(
                f"{mark.name} takes {len(parameters)} arguments; expected the message, or the message and a Context",
                mark.location,
            )
        for message in mark.messages:
            participant = Participant(
                kind=mark.kind,
                message=message,
                function=function,
                name=mark.name,
                location=mark.location,
                takes_context=len(parameters) == 2,
                retry=mark.retry,
                timeout=mark.timeout,
                concurrency=mark.concurrency,
            )
            if mark.kind == "command":
                self._add_command(participant)
            else:
                self._add_subscriber(participant)

    def _add_command(self, participant: Participant) -> None:
        self.registry.add(participant.message)
        type_name = message_type(participant.message).name
        other = self.commands.setdefault(type_name, participant)
        if other is not participant:
            raise self._fail(
                f"command {type_name} has two handlers, {other.name} at {other.location} and "
                f"{participant.name}; expected one",
                participant.location,
            )

    def _add_subscriber(self, participant: Participant) -> None:
        known = self.subscribers.get(participant.name)
        if known is not None and known.function != participant.function:
            raise self._fail(
                f"two subscribers are called {participant.name!r}, here and at {known.location}; expected "
                "different names: the name is part of the inbox key; give one with name=",
                participant.location,
            )
        self.subscribers.setdefault(participant.name, participant)
        for cls in _with_subclasses(participant.message):
            self.registry.add(cls)
            self._subscribed.setdefault(message_type(cls).name, []).append(participant)

    def _check_undo(self) -> None:
        """A command handled here whose undo nobody here handles could never be undone."""
        for definition in self.sagas.values():
            for sending in definition.sendings:
                if sending.undo is None or sending.message.name not in self.commands:
                    continue
                if sending.undo.name not in self.commands:
                    raise self._fail(
                        f"saga {definition.saga_type} undoes {sending.message.name} with {sending.undo.name}, which "
                        f"nobody handles; expected a function with @handles for it among the handlers",
                        sending.location,
                    )

    # ------------------------------------------------------------------------------------- running

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """The definitions of its sagas."""
        return tuple(self.sagas.values())

    def catalog(self, sender: Sender | None = None, retry: Retry | None = None) -> Catalog:
        """What `plan_batch` needs of this service."""
        base = sender or Sender(self.name)
        return Catalog(
            definitions=self.sagas,
            decode=self.decode,
            sender=msgspec.structs.replace(
                base,
                service=self.name,
                reply_to=self.reply_topic,
                reply_topics=tuple(sorted(self.topics - {self.reply_topic})),
            ),
            retry=retry or Retry(),
        )

    def decode(self, envelope: Envelope) -> Message:
        """The message of an envelope. Raises DecodeError.

        A reply of a type that no saga or handler here names still answers its command.
        """
        if envelope.in_reply_to and envelope.type not in self.registry:
            return _ANSWER
        return decode_framework(envelope) or self.registry.decode(envelope)

    def works_on(self, type_name: str) -> bool:
        """True where some participant here takes messages of a type."""
        return type_name in self.commands or bool(self._subscribed.get(type_name))

    def participants(self, envelope: Envelope) -> Iterator[tuple[str, Participant]]:
        """Who must work on a message here, each with its inbox name."""
        command = self.commands.get(envelope.type)
        if command is not None:
            yield self.name, command
        for subscriber in self._subscribed.get(envelope.type, ()):
            yield f"{self.name}.{subscriber.name}", subscriber

    def participant(self, consumer: str, type_name: str) -> Participant | None:
        """The participant of an inbox name for a message type."""
        if consumer == self.name:
            return self.commands.get(type_name)
        for subscriber in self._subscribed.get(type_name, ()):
            if f"{self.name}.{subscriber.name}" == consumer:
                return subscriber
        return None

    @property
    def consumers(self) -> dict[str, int | None]:
        """Inbox name of each participant -> the limit its decorator sets."""
        names: dict[str, int | None] = {self.name: None} if self.commands else {}
        for name, subscriber in self.subscribers.items():
            names[f"{self.name}.{name}"] = subscriber.concurrency
        return names

    def is_lost_command(self, envelope: Envelope) -> bool:
        """True for a command addressed to this service that nobody here handles.

        A command's topic is the address of one service, so nobody else will.
        """
        return (
            envelope.kind == "command"
            and envelope.topic in self.command_topics
            and envelope.type not in self.commands
        )

    def work_rows(self, envelope: Envelope, now: int) -> list[ParkedRow]:
        """The parked rows from which the participants of a message take their work."""
        lane = f"{envelope.saga_uid}:{envelope.topic}" if envelope.saga_uid else ""
        return [
            ParkedRow(
                consumer=consumer,
                message_id=envelope.id,
                lane=lane if participant.kind == "command" else "",
                sequence=envelope.sequence,
                due_at=now,
                attempts=0,
                parked_at=now,
                reason="work",
                envelope=envelope,
            )
            for consumer, participant in self.participants(envelope)
        ]

    # --------------------------------------------------------------------------------------- start

    async def start(
        self, saga: type[Saga], event: Event, *, session: Appends, key: object | None = None
    ) -> str:
        """Starts an instance explicitly, in the caller's transaction; returns its key.

        The event must be one that starts the saga. Without `key` the event's key field is taken,
        and a saga that declares no key gets a new one. Raises DefinitionError for another event.
        """
        row = self.starting(saga, event, key=key)
        await session.append_envelopes([row])
        return row.envelope.saga_key

    def starting(self, saga: type[Saga], event: Event, *, key: object | None = None) -> OutboxRow:
        """The outbox row with which `start` starts an instance."""
        definition = saga.__definition__
        if definition.saga_type not in self.sagas:
            raise self._fail(f"saga {definition.saga_type} is not run by this service")
        facts = message_type(event)
        if facts.name not in definition.starts:
            raise self._fail(
                f"{facts.name} does not start {definition.saga_type}; expected one of "
                f"{', '.join(sorted(definition.starts))}"
            )
        if key is None:
            keys = definition.routes[facts.name].keys(event)
            key = keys[0] if keys else uuid4().hex
        what = "key of the new instance"
        return self._row(
            event,
            saga_type=definition.saga_type,
            saga_key=checked_id(key_text(key, what), what),
        )

    async def send(self, command: Command, *, session: Appends) -> str:
        """Sends a command from outside, in the caller's transaction; returns its command id.

        For a web page, a command line, a script: whoever handles the command does the same as for a
        saga's. Nobody is told of its failure; it becomes a dead letter.
        """
        row = self._row(command)
        await session.append_envelopes([row])
        return row.envelope.id

    def _row(self, message: Message, **header: Any) -> OutboxRow:
        """The outbox row of a message that this program sends because of what it is doing."""
        origin = current_origin()
        message_id = uuid4().hex
        envelope = enveloped(
            message,
            message_id=message_id,
            time=recording_now(),
            source=origin.source or self.name,
            correlation_id=origin.correlation_id or message_id,
            causation_id=origin.causation_id,
            actor=origin.actor,
            hops=origin.hops,
            traceparent=origin.traceparent,
            tracestate=origin.tracestate,
            **header,
        )
        return OutboxRow("", envelope)

    # ------------------------------------------------------------------------------------ describe

    def describe(self) -> list[str]:
        """The service in lines, for the start-up banner and the catalog."""
        lines = [f"service {self.name}"]
        for definition in self.definitions:
            states = ", ".join(
                f"[{name}]" if state.final else name for name, state in definition.states.items()
            )
            key = f" by {definition.key_field}" if definition.key_field else ""
            lines.append(f"saga {definition.saga_type}{key}: {states}")
            lines.extend(f"  on {name}" for name in sorted(definition.routes))
        lines.extend(
            f"handles {name} ({self.commands[name].name})" for name in sorted(self.commands)
        )
        lines.extend(
            f"subscribes {name} ({', '.join(p.name for p in self._subscribed[name])})"
            for name in sorted(self._subscribed)
        )
        lines.append(f"topics {', '.join(sorted(self.topics)) or 'none'}")
        return lines

    def __repr__(self) -> str:
        return f"<Service {self.name}>"


def _with_subclasses(cls: type[Message]) -> Iterator[type[Message]]:
    """A class and everything below it, without the ones that have no topic."""
    if message_type(cls).topic:
        yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)


# ----------------------------------------------------------------------------------------- replies


def replies(command: Envelope, events: Sequence[Event], now: int, service: str) -> list[OutboxRow]:
    """The rows that answer a command: its events, or `CommandDone` where there are none.

    A reply travels on its event's own topic, for whoever listens; where the sender does not listen
    there, one more copy goes to the sender.
    """
    if not events:
        if not command.reply_to:
            return []
        done = CommandDone(command.id, command.type)
        return [_reply(command, done, command.reply_to, "done", now, service)]
    rows: list[OutboxRow] = []
    for index, event in enumerate(events):
        topic = message_type(event).topic
        rows.append(_reply(command, event, topic, f"reply{index}", now, service))
        if command.reply_to and topic not in command.reply_topics:
            rows.append(_reply(command, event, command.reply_to, f"copy{index}", now, service))
    return rows


def failure(
    command: Envelope, reason: str, *, refused: bool, attempts: int, now: int, service: str
) -> list[OutboxRow]:
    """The row that tells the sender of a command that it failed for good."""
    if not command.reply_to:
        return []
    failed = CommandFailed(command.id, command.type, reason[:2000], refused, attempts)
    return [_reply(command, failed, command.reply_to, "failed", now, service)]


def follow_ups(
    cause: Envelope, consumer: str, messages: Sequence[Message], origin: Origin, now: int
) -> list[OutboxRow]:
    """The rows of what a participant sent or published beside its reply."""
    rows: list[OutboxRow] = []
    for index, message in enumerate(messages):
        message_id = derived_id(cause.id, consumer, f"follow{index}", message_type(message).name)
        envelope = enveloped(
            message,
            message_id=message_id,
            time=now,
            source=origin.source,
            correlation_id=origin.correlation_id,
            causation_id=origin.causation_id,
            actor=origin.actor,
            hops=origin.hops,
            traceparent=origin.traceparent,
            tracestate=origin.tracestate,
        )
        rows.append(OutboxRow("", envelope))
    return rows


def _reply(
    command: Envelope, message: Message, topic: str, part: str, now: int, service: str
) -> OutboxRow:
    envelope = enveloped(
        message,
        message_id=derived_id(command.id, service, part, message_type(message).name),
        time=now,
        topic=topic,
        source=service,
        correlation_id=command.correlation_id or command.id,
        causation_id=command.id,
        actor=command.actor,
        hops=command.hops + 1,
        saga_type=command.saga_type,
        saga_key=command.saga_key,
        saga_uid=command.saga_uid,
        in_reply_to=command.id,
        traceparent=command.traceparent,
        tracestate=command.tracestate,
    )
    return OutboxRow("", envelope)


__all__ = [
    "Appends",
    "Context",
    "Lifespan",
    "Participant",
    "Reply",
    "Service",
    "failure",
    "follow_ups",
    "handles",
    "replies",
    "subscribes",
]
