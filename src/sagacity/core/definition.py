"""A saga class looked at as a whole: the transition table that `decide` and the diagrams read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import msgspec

from sagacity.core.delivery import Envelope, checked_id
from sagacity.core.errors import DecodeError, HandlerError
from sagacity.core.messages import Event, Message, message_type
from sagacity.core.saga import KeyOf, Missing, Saga, State, key_text
from sagacity.core.source import Sending, Source

Kind = Literal["event", "failure", "done", "timeout"]


class Handler(msgspec.Struct, frozen=True):
    """One row of the transition table: in these states, on this trigger, call this, then go there."""

    name: str
    function: Callable[..., Any]
    kind: Kind
    trigger: str
    """Type name of the event or command, or name of the timeout."""
    when: tuple[str, ...]
    goto: tuple[str, ...]
    starts: bool
    takes: bool
    """True where the function takes the message."""
    location: str
    compensates: bool
    """True where its source calls ``self.compensate``."""

    def targets(self, state: str) -> tuple[str, ...]:
        """The states it may lead to from `state`; without ``goto=`` it stays."""
        return self.goto or (state,)


class Route(msgspec.Struct, frozen=True):
    """How an event finds its instances."""

    event: type[Event]
    key_name: str
    """A further correlation key, or an empty string for the saga's own."""
    field: KeyOf | None
    """None: the event carries no key, only replies reach an instance."""
    starts: bool
    missing: Missing

    def keys(self, event: Message) -> tuple[str, ...]:
        """The key values in an event, without repetition.

        Raises DecodeError for a value that cannot be a key; a null key is never tried again.
        """
        if self.field is None:
            return ()
        what = f"event {message_type(event).name}: correlation key"
        try:
            value: Any = self.field(event) if callable(self.field) else getattr(event, self.field)
            # A set has no order of its own; every worker must see the same one.
            unordered = isinstance(value, set | frozenset)
            several = isinstance(value, list | tuple | set | frozenset)
            values = cast("Iterable[object]", value if several else (value,))
            texts = [checked_id(key_text(one, what), what) for one in values]
        except HandlerError as error:
            raise DecodeError(str(error)) from error
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(f"{what}: {type(error).__name__}: {error}") from error
        return tuple(dict.fromkeys(sorted(texts) if unordered else texts))


class Definition:
    """What `decide` knows of one saga class. Made by `build`, never changed."""

    def __init__(
        self,
        cls: type[Saga],
        *,
        saga_type: str,
        key_field: str,
        version: int,
        parallel: bool,
        restartable: bool,
        location: str,
        states: dict[str, State],
        handlers: list[Handler],
        routes: dict[str, Route],
        policies: dict[tuple[str, str], Literal["ignore", "defer"]],
        sources: Mapping[str, Source],
    ) -> None:
        self.cls, self.saga_type, self.key_field, self.version = cls, saga_type, key_field, version
        self.parallel, self.restartable, self.location = parallel, restartable, location
        self.states, self.handlers = states, tuple(handlers)
        self.routes, self.policies = routes, policies
        self._sources = sources
        self._sendings: tuple[Sending, ...] | None = None
        self.final = frozenset(name for name, state in states.items() if state.final)
        self.timeouts = frozenset(h.trigger for h in handlers if h.kind == "timeout")
        self.key_names = frozenset(route.key_name for route in routes.values() if route.key_name)
        self.starts = {h.trigger: h for h in handlers if h.starts}
        self._table = {(state, h.kind, h.trigger): h for h in handlers for state in h.when}
        self.reachable = {name: reach(name, self.handlers) for name in states}
        self._encode = msgspec.json.Encoder(order="deterministic").encode
        self._decode: Callable[[bytes], Saga] = msgspec.json.Decoder(cls).decode
        self._key_type: Any = None

    @property
    def sendings(self) -> tuple[Sending, ...]:
        """What the source of the saga shows that it sends and publishes.

        Read on first use, when the messages that its methods name exist.
        """
        if self._sendings is None:
            self._sendings = tuple(
                sending for source in self._sources.values() for sending in source.sendings()
            )
        return self._sendings

    def handler(self, state: str, kind: Kind, trigger: str) -> Handler | None:
        """The handler of a trigger in a state."""
        return self._table.get((state, kind, trigger))

    def waits(self, state: str, kind: Kind, trigger: str) -> bool:
        """True where an unhandled trigger is early: a state reachable from here handles it.

        ``ignore`` and ``defer`` lines of the class override the graph.
        """
        policy = self.policies.get((state, trigger))
        if policy is not None:
            return policy == "defer"
        return any((other, kind, trigger) in self._table for other in self.reachable[state])

    def new(self, key: str) -> Saga:
        """A fresh saga object. Raises DecodeError for a key that the key field does not take."""
        if not self.key_field:
            return self.cls()
        try:
            if self._key_type is None:  # on first use, when the names in annotations exist
                fields = {field.name: field.type for field in fields_of(self.cls)}
                self._key_type = fields[self.key_field]
            value = key if self._key_type is str else _converted(key, self._key_type)
            saga = self.cls(**{self.key_field: value})
            same = self.has_key(saga, key)
        except (msgspec.ValidationError, TypeError, HandlerError) as error:
            raise DecodeError(
                f"{self.saga_type}: key {key!r} does not fit {self.key_field}: {error}"
            ) from error
        if not same:
            raise DecodeError(
                f"{self.saga_type}: key {key!r} does not fit {self.key_field}: it would be written "
                f"{self.key_of(saga)!r}; expected one way to write each key"
            )
        return saga

    def key_of(self, saga: Saga) -> str:
        """The key in the data of a saga object. Raises HandlerError for what cannot be a key."""
        return key_text(
            getattr(saga, self.key_field), f"{self.saga_type}: key field {self.key_field}"
        )

    def has_key(self, saga: Saga, key: str) -> bool:
        """True where the key field of a saga object says `key`. Raises HandlerError as `key_of`."""
        value = getattr(saga, self.key_field)
        return bool(value == key) if type(value) is str else self.key_of(saga) == key

    def encode(self, saga: Saga) -> bytes:
        """A saga's data as JSON, the same bytes each time. Raises HandlerError for other values."""
        try:
            return self._encode(saga)
        except (
            TypeError,
            ValueError,
            OverflowError,
            RecursionError,
            msgspec.MsgspecError,
        ) as error:
            raise HandlerError(
                f"{self.saga_type}: the data cannot be stored: {error}; expected plain values as annotated"
            ) from error

    def decode(self, data: bytes) -> Saga:
        """The saga object of stored data. Raises DecodeError where it does not fit the class."""
        try:
            return self._decode(data)
        except Exception as error:
            raise DecodeError(
                f"{self.saga_type}: stored data does not fit the class: {type(error).__name__}: {error}; "
                "give new fields a default, or migrate the rows"
            ) from error

    def __repr__(self) -> str:
        return f"<Definition {self.saga_type} of {len(self.states)} states>"


def _converted(key: str, type_: Any) -> Any:
    return msgspec.convert(key, type_, strict=False)


def fields_of(cls: type) -> tuple[msgspec.structs.FieldInfo, ...]:
    """The data fields of a saga class."""
    return msgspec.structs.fields(cast("type[msgspec.Struct]", cls))


def reach(start: str, handlers: Iterable[Handler]) -> frozenset[str]:
    """The states that can come after `start`, itself only if a cycle leads back."""
    edges: dict[str, set[str]] = {}
    for handler in handlers:
        for state in handler.when:
            edges.setdefault(state, set()).update(handler.goto)
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in edges.get(todo.pop(), ()):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return frozenset(seen)


def describe(definition: Definition, envelope: Envelope) -> str:
    """``Type 'key' got message``: how errors and logs name a step."""
    return f"{definition.saga_type} {envelope.saga_key!r} got {envelope.type} {envelope.id}"
