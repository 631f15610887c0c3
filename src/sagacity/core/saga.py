"""The `Saga` class, its states, and the decorators that make it a transition table.

A saga handler is a pure function of its instance and the message: it changes `self` and records
effects. It is given the time and ids; it never asks for them. ``async def`` is welcome as long as
it never really waits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cached_property
from types import CoroutineType, FunctionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    dataclass_transform,
    overload,
)
from uuid import UUID

import msgspec

from sagacity.core.delivery import Envelope, checked_id, derived_id
from sagacity.core.effects import (
    CancelTimeout,
    Correlate,
    Effect,
    Encoded,
    Publish,
    Send,
    SetTimeout,
)
from sagacity.core.errors import DefinitionError, HandlerError, Suspended
from sagacity.core.instance import PendingCommand
from sagacity.core.messages import (
    Command,
    CommandDone,
    CommandFailed,
    Event,
    MessageType,
    caller_location,
    calling_frame,
    encode_message,
    message_type,
)

if TYPE_CHECKING:
    from sagacity.core.definition import Definition

E1 = TypeVar("E1", bound=Event)
E2 = TypeVar("E2", bound=Event)
E3 = TypeVar("E3", bound=Event)
E4 = TypeVar("E4", bound=Event)
E5 = TypeVar("E5", bound=Event)
E6 = TypeVar("E6", bound=Event)
E_co = TypeVar("E_co", covariant=True)
H = TypeVar("H", bound=Callable[..., Any])

Missing = Literal["wait", "ignore", "dead-letter"]
"""What to do with an event that finds no instance: park it for a bounded time (then it becomes a
dead letter), forget it, or make it a dead letter at once."""

KeyOf = str | Callable[[Any], object]
"""A field name of the event, or a function from the event to a key, or to several."""


class State:
    """One state of a saga; its name is the name of the class attribute.

    `final` states end the instance. Compare states with ``is``.
    """

    __slots__ = ("final", "location", "name")

    def __init__(self, *, final: bool = False) -> None:
        self.final = final
        self.name = ""
        self.location = caller_location(1)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<State {self.name}{' (final)' if self.final else ''}>"


States = State | tuple[State, ...]


class Declared(msgspec.Struct, frozen=True):
    """One decorator on a handler, before the class is looked at as a whole."""

    kind: Literal["event", "failure", "done", "timeout"]
    trigger: Any
    """The event or command class, or the name of the timeout."""
    when: tuple[State, ...] | None
    goto: tuple[State, ...]
    starts: bool
    key: str | None
    field: KeyOf | None
    missing: Missing
    location: str


class Policy(msgspec.Struct, frozen=True):
    """An `ignore` or `defer` line of a class body."""

    kind: Literal["ignore", "defer"]
    event: type[Event]
    when: tuple[State, ...] | None
    location: str


DECLARED = "__sagacity_declared__"
POLICIES = "__sagacity_policies__"


class _EventHandler(Protocol[E_co]):
    """Takes a method that takes the event, or only ``self``."""

    # What comes back takes anything, so that another decorator can be put on top of this one.
    @overload
    def __call__(self, handler: Callable[[Any, E_co], Any], /) -> Callable[[Any, Any], Any]: ...
    @overload
    def __call__(self, handler: Callable[[Any], Any], /) -> Callable[[Any], Any]: ...


class _Options(TypedDict, total=False):
    when: States | None
    goto: States | None
    starts: bool
    key: str | None
    field: KeyOf | None
    missing: Missing


def _states(value: States | None) -> tuple[State, ...] | None:
    if value is None or isinstance(value, tuple):
        return value
    return (value,)


def _declare(declared: list[Declared]) -> Callable[[H], H]:
    def mark(handler: H) -> H:
        given: object = handler
        if not isinstance(given, FunctionType):
            raise DefinitionError(
                f"@{declared[0].kind} handlers are plain methods, got {type(given).__name__}; "
                "expected the decorator directly above def, below no other",
                declared[0].location,
            )
        known: list[Declared] = getattr(handler, DECLARED, [])
        setattr(handler, DECLARED, [*known, *declared])
        return handler

    return mark


@overload
def on(event1: type[E1], /, **options: Unpack[_Options]) -> _EventHandler[E1]: ...
@overload
def on(
    event1: type[E1], event2: type[E2], /, **options: Unpack[_Options]
) -> _EventHandler[E1 | E2]: ...
@overload
def on(
    event1: type[E1], event2: type[E2], event3: type[E3], /, **options: Unpack[_Options]
) -> _EventHandler[E1 | E2 | E3]: ...
@overload
def on(
    event1: type[E1],
    event2: type[E2],
    event3: type[E3],
    event4: type[E4],
    /,
    **options: Unpack[_Options],
) -> _EventHandler[E1 | E2 | E3 | E4]: ...
@overload
def on(
    event1: type[E1],
    event2: type[E2],
    event3: type[E3],
    event4: type[E4],
    event5: type[E5],
    /,
    **options: Unpack[_Options],
) -> _EventHandler[E1 | E2 | E3 | E4 | E5]: ...
@overload
def on(
    event1: type[E1],
    event2: type[E2],
    event3: type[E3],
    event4: type[E4],
    event5: type[E5],
    event6: type[E6],
    /,
    **options: Unpack[_Options],
) -> _EventHandler[E1 | E2 | E3 | E4 | E5 | E6]: ...
@overload
def on(*events: type[Event], **options: Unpack[_Options]) -> _EventHandler[Any]: ...
def on(
    *events: type[Event],
    when: States | None = None,
    goto: States | None = None,
    starts: bool = False,
    key: str | None = None,
    field: KeyOf | None = None,
    missing: Missing = "wait",
) -> _EventHandler[Any]:
    """Handles events.

    `when` names the states in which it does (default: every state that is not final). `goto` names
    every possible next state: with one, the saga goes there unless the handler says otherwise; with
    several, the handler calls ``self.goto``, and else stays if the present state is among them.
    Without `goto` the saga stays. `starts` lets the event create the instance.

    `key` is the correlation key to look by (default: the saga's own), `field` the event's field that
    carries it, or a function of the event (default: the field named like the key). `missing` says
    what becomes of an event that finds no instance.
    """
    if not events:
        raise DefinitionError("@on needs an event class, got none", caller_location(1))
    location = caller_location(1)
    return cast(
        "_EventHandler[Any]",
        _declare(
            [
                Declared(
                    "event",
                    event,
                    _states(when),
                    _states(goto) or (),
                    starts,
                    key,
                    field,
                    missing,
                    location,
                )
                for event in events
            ]
        ),
    )


def _on_command(
    kind: Literal["failure", "done"],
    commands: tuple[type[Command], ...],
    when: States | None,
    goto: States | None,
) -> Callable[[H], H]:
    location = caller_location(2)
    if not commands:
        raise DefinitionError(f"@on_{kind} needs a command class, got none", location)
    return _declare(
        [
            Declared(
                kind,
                command,
                _states(when),
                _states(goto) or (),
                False,
                None,
                None,
                "ignore",
                location,
            )
            for command in commands
        ]
    )


def on_failure(
    *commands: type[Command], when: States | None = None, goto: States | None = None
) -> Callable[[H], H]:
    """Handles the final failure of a command: refused, or out of attempts.

    The handler takes ``self`` and, if it likes, the `CommandFailed`. A failure that no handler takes
    makes the saga compensate.
    """
    return _on_command("failure", commands, when, goto)


def on_done(
    *commands: type[Command], when: States | None = None, goto: States | None = None
) -> Callable[[H], H]:
    """Handles the answer of a command whose participant returns nothing.

    The handler takes ``self`` and, if it likes, the `CommandDone`.
    """
    return _on_command("done", commands, when, goto)


def on_timeout(
    name: str, *, when: States | None = None, goto: States | None = None
) -> Callable[[H], H]:
    """Handles the timeout that ``self.set_timeout(name, ...)`` armed."""
    declared = Declared(
        "timeout",
        name,
        _states(when),
        _states(goto) or (),
        False,
        None,
        None,
        "ignore",
        caller_location(1),
    )
    return _declare([declared])


def _policy(
    kind: Literal["ignore", "defer"], events: tuple[type[Event], ...], when: States | None
) -> None:
    namespace = calling_frame(2).f_locals
    location = caller_location(2)
    if "__qualname__" not in namespace:
        raise DefinitionError(f"{kind}() belongs into the body of a saga class", location)
    policies: list[Policy] = namespace.setdefault(POLICIES, [])
    policies.extend(Policy(kind, event, _states(when), location) for event in events)


def ignore(*events: type[Event], when: States | None = None) -> None:
    """In a class body: in these states (default: all) these events are ignored, never deferred."""
    _policy("ignore", events, when)


def defer(*events: type[Event], when: States | None = None) -> None:
    """In a class body: in these states (default: all) these events wait for a later state."""
    _policy("defer", events, when)


class Turn:
    """One call of a handler: what it is given, and what it has asked for so far."""

    __slots__ = (
        "compensation",
        "definition",
        "effects",
        "envelope",
        "goto",
        "key",
        "now",
        "ordinal",
        "pending",
        "state",
        "targets",
        "uid",
    )

    def __init__(
        self,
        definition: Definition,
        envelope: Envelope,
        now: int,
        *,
        key: str,
        uid: str,
        state: str,
        targets: tuple[str, ...],
        pending: dict[str, PendingCommand],
    ) -> None:
        self.definition, self.envelope, self.now = definition, envelope, now
        self.key, self.uid, self.state, self.targets = key, uid, state, targets
        self.pending = dict(pending)
        self.effects: list[Effect] = []
        self.goto: str | None = None
        self.compensation: str | None = None
        self.ordinal = 0

    def next_id(self, name: str) -> str:
        """G4: the same message makes the same ids, whoever handles it and however often."""
        self.ordinal += 1
        return derived_id(self.uid, self.envelope.id, str(self.ordinal), name)

    def where(self) -> str:
        return f"{self.definition.saga_type} {self.key!r} in state {self.state!r}"


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Handling:
    """What a saga handler can do and see. Mixed into `Saga`."""

    __slots__ = ()

    @property
    def _turn(self) -> Turn:
        try:
            return cast("Turn", self.__dict__["_turn"])
        except KeyError:
            raise HandlerError(
                f"{type(self).__name__}: only a handler that is being run can do this; to test a "
                "saga without a worker use sagacity.testing"
            ) from None

    @property
    def now(self) -> datetime:
        """The time of this step, aware, in UTC. The only clock a handler may use."""
        return _EPOCH + timedelta(microseconds=self._turn.now)

    @property
    def key(self) -> str:
        """The correlation key of this instance."""
        return self._turn.key

    @property
    def state(self) -> str:
        """Name of the state in which the message found the instance."""
        return self._turn.state

    @property
    def message(self) -> Envelope:
        """The envelope of the message being handled: ids, actor, time. Its body is undecoded."""
        return self._turn.envelope

    @property
    def pending(self) -> tuple[PendingCommand, ...]:
        """The commands of this instance that nobody has answered, oldest first."""
        return tuple(self._turn.pending.values())

    def new_id(self, name: str = "id") -> str:
        """A new id, the same again when the same message is handled again: 32 hex digits."""
        return self._turn.next_id(name)

    def send(self, command: Command, *, undo: Command | None = None) -> str:
        """Sends a command after commit; returns its id.

        `undo` is kept with it, and sent should the saga compensate: also when nobody has answered
        by then, but not when the command was refused. Raises HandlerError once the handler has
        compensated, and for an undo with another topic, which could overtake its command.
        """
        turn = self._turn
        if not _is_a("command", command) or not (undo is None or _is_a("command", undo)):
            raise HandlerError(
                f"{turn.where()}: send expects commands, got {type(command).__name__}"
                + (f" with undo {type(undo).__name__}" if undo is not None else "")
                + "; publish events with self.publish"
            )
        if turn.compensation is not None:
            raise HandlerError(
                f"{turn.where()}: cannot send {type(command).__name__} after compensate; forward "
                "handling stops for good once compensation starts"
            )
        facts = message_type(command)
        if undo is not None and message_type(undo).topic != facts.topic:
            raise HandlerError(
                f"{turn.where()}: undo {type(undo).__name__} has topic {message_type(undo).topic!r}; "
                f"expected {facts.topic!r}, the topic of {type(command).__name__}, or it could overtake it"
            )
        command_id = turn.next_id(facts.name)
        encoded = Encoded(facts, encode_message(command))
        undoing = None if undo is None else Encoded(message_type(undo), encode_message(undo))
        turn.effects.append(Send(encoded, undoing, command_id))
        turn.pending[command_id] = PendingCommand(command_id, facts.name, facts.topic, turn.now)
        return command_id

    def publish(self, event: Event) -> str:
        """Publishes an event after commit; returns its message id."""
        turn = self._turn
        if not _is_a("event", event):
            raise HandlerError(
                f"{turn.where()}: publish expects an event, got {type(event).__name__}; "
                "send commands with self.send"
            )
        facts = message_type(event)
        message_id = turn.next_id(facts.name)
        turn.effects.append(Publish(Encoded(facts, encode_message(event)), message_id))
        return message_id

    def set_timeout(
        self, name: str, *, after: timedelta | None = None, at: datetime | None = None
    ) -> None:
        """Arms a timeout, replacing an armed one of the same name.

        Give either `after`, counted from the time of this step, or `at`, an aware datetime. It
        fires never early and at most once; a handler ``@on_timeout(name)`` must exist.
        """
        turn = self._turn
        if name not in turn.definition.timeouts:
            raise HandlerError(
                f"{turn.where()}: timeout {name!r} has no handler; expected one of "
                f"{', '.join(sorted(turn.definition.timeouts)) or 'none'}; add @on_timeout({name!r})"
            )
        if (after is None) == (at is None):
            raise HandlerError(f"{turn.where()}: set_timeout expects either after= or at=")
        if at is not None:
            if at.tzinfo is None:
                raise HandlerError(
                    f"{turn.where()}: set_timeout expects an aware datetime, got the naive {at!r}"
                )
            due_at = (at - _EPOCH) // timedelta(microseconds=1)
        else:
            due_at = turn.now + cast("timedelta", after) // timedelta(microseconds=1)
        if not 0 <= due_at < 1 << 62:
            raise HandlerError(
                f"{turn.where()}: timeout {name!r} is due out of range: {after or at!r}"
            )
        turn.effects.append(SetTimeout(name, due_at))

    def cancel_timeout(self, name: str) -> None:
        """Disarms a timeout; one that is not armed is no error."""
        self._turn.effects.append(CancelTimeout(name))

    def correlate(self, name: str, value: object, *, unique: bool = False) -> None:
        """Lets events find this instance by one more key, from the next message on.

        Several instances may share a value unless `unique`; then the second one to claim it fails.
        An instance may have several values of one name.
        """
        turn = self._turn
        if name not in turn.definition.key_names:
            raise HandlerError(
                f"{turn.where()}: correlation key {name!r} is not used by any handler; expected one of "
                f"{', '.join(sorted(turn.definition.key_names)) or 'none'}; "
                f"add key={name!r} to the @on that looks by it"
            )
        text = checked_id(key_text(value, f"{turn.where()}: correlation key {name}"), f"key {name}")
        turn.effects.append(Correlate(name, text, unique))

    def goto(self, state: State) -> None:
        """Makes `state` the next one. It must be among the handler's ``goto=``."""
        turn = self._turn
        if state.name not in turn.targets:
            raise HandlerError(
                f"{turn.where()}: goto {state.name!r} is not declared; expected one of "
                f"{', '.join(turn.targets) or 'none'}; add it to goto= of the handler"
            )
        turn.goto = state.name

    def compensate(self, reason: str) -> None:
        """Undoes what was done: the undo of every command sent and not refused, newest first.

        Each undo is sent when the one before it is confirmed (all at once with ``parallel=True`` on
        the class). Unanswered commands are undone too. Forward handling stops for good.
        """
        self._turn.compensation = reason


def key_text(value: object, what: str) -> str:
    """A correlation key as text: strings as they are, integers and UUIDs by ``str``.

    Raises HandlerError for anything else: text of a float or an object is no identity.
    """
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, UUID):
        return str(value)
    raise HandlerError(
        f"{what}: expected text, an integer or a UUID, got {type(value).__name__} {value!r}"
    )


def _is_a(kind: str, message: object) -> bool:
    """True for an event or a command; an unchecked program may pass anything."""
    facts = getattr(type(message), "__message_type__", None)
    return isinstance(facts, MessageType) and facts.kind == kind


RESERVED = frozenset(name for name in vars(_Handling) if not name.startswith("__"))
"""Names a saga's own fields, states and methods cannot have."""


if TYPE_CHECKING:

    @dataclass_transform(kw_only_default=True, field_specifiers=(msgspec.field,))
    class Saga(_Handling):
        """A process over time: subclass it, declare states, data fields and handlers."""

        __definition__: ClassVar[Definition]

        def __init_subclass__(
            cls,
            *,
            key: str = "",
            name: str = "",
            version: int = 1,
            parallel: bool = False,
            restartable: bool = False,
            abstract: bool = False,
        ) -> None: ...

else:

    class _SagaMeta(type(msgspec.Struct)):
        """Reads the class keywords and validates the class as a transition table."""

        def __new__(
            mcls,
            class_name: str,
            bases: tuple[type, ...],
            namespace: dict[str, Any],
            *,
            key: str = "",
            name: str = "",
            version: int = 1,
            parallel: bool = False,
            restartable: bool = False,
            abstract: bool = False,
            **options: Any,
        ) -> Any:
            location = caller_location(1)
            try:
                cls = super().__new__(
                    mcls, class_name, bases, namespace, **{**options, "dict": True, "kw_only": True}
                )
            except TypeError as error:
                raise DefinitionError(f"saga {class_name}: {error}", location) from error
            if not abstract:
                # validation.py needs the finished Saga class; this module is complete by now.
                from sagacity.core.validation import build

                cls.__definition__ = build(
                    cls,
                    key=key,
                    name=name or class_name,
                    version=version,
                    parallel=parallel,
                    restartable=restartable,
                    location=location,
                )
            return cls

    class Saga(_Handling, msgspec.Struct, metaclass=_SagaMeta, abstract=True, dict=True):
        """A process over time: subclass it, declare states, data fields and handlers."""

        __definition__: ClassVar[Any]


def run_handler(
    saga: Saga, turn: Turn, function: Callable[..., Any], argument: object, *, takes: bool
) -> None:
    """Calls a handler; an ``async def`` one is run as far as it goes without waiting.

    Raises `Suspended` for one that waits, `HandlerError` for one that returns something or leaves
    behind what is not stored, and whatever the handler raises.
    """
    attributes = vars(saga)
    attributes["_turn"] = turn
    result = function(saga, argument) if takes else function(saga)
    if result is not None and inspect.iscoroutine(result):
        result = _finished(function, result)
    if result is not None:
        raise HandlerError(
            f"{turn.where()}: {function.__qualname__} returned {type(result).__name__}; expected None: "
            "a saga handler records effects with self.send, self.publish and so on"
        )
    if len(attributes) > 1:
        _check_stored(saga, turn, function)
    if turn.definition.key_field and not turn.definition.has_key(saga, turn.key):
        name = turn.definition.key_field
        raise HandlerError(
            f"{turn.where()}: {function.__qualname__} set the key field {name} to "
            f"{getattr(saga, name)!r}; expected it to stay as it is: it is the identity of the instance"
        )


def _check_stored(saga: Saga, turn: Turn, function: Callable[..., Any]) -> None:
    for name in vars(saga):
        if name != "_turn" and not isinstance(getattr(type(saga), name, None), cached_property):
            raise HandlerError(
                f"{turn.where()}: {function.__qualname__} set self.{name}, which is no field of the "
                f"saga and would be lost; expected an annotation {name}: ... in the class"
            )


def _finished(function: Callable[..., Any], coroutine: CoroutineType[Any, Any, Any]) -> object:
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    code = inspect.unwrap(function).__code__
    raise Suspended(
        f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno}) waits for something; a saga "
        "handler must not: it may be run again, in a batch, inside a transaction. Send a command and "
        "do the I/O in its @handles participant"
    )


__all__ = [
    "CommandDone",
    "CommandFailed",
    "Missing",
    "Saga",
    "State",
    "defer",
    "ignore",
    "on",
    "on_done",
    "on_failure",
    "on_timeout",
]
