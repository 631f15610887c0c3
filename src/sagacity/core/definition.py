"""A saga class looked at as a whole: the transition table, and everything that is wrong with it.

`build` runs while the class statement runs, so that a saga that could not work never comes into
being. Every complaint names file and line.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import msgspec

from sagacity.core.delivery import Envelope, checked_id
from sagacity.core.errors import DecodeError, DefinitionError, HandlerError
from sagacity.core.messages import Command, Event, Message, MessageType, message_type
from sagacity.core.saga import (
    DECLARED,
    POLICIES,
    Declared,
    KeyOf,
    Missing,
    Policy,
    Saga,
    State,
    key_text,
)

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
        value = self.field(event) if callable(self.field) else getattr(event, self.field)
        values = value if isinstance(value, list | tuple | set | frozenset) else (value,)
        what = f"event {message_type(event).name}: correlation key"
        try:
            texts = [checked_id(key_text(one, what), what) for one in values]
        except HandlerError as error:
            raise DecodeError(str(error)) from error
        return tuple(dict.fromkeys(sorted(texts) if isinstance(value, set | frozenset) else texts))


class Sending(msgspec.Struct, frozen=True):
    """A ``self.send`` or ``self.publish`` that the source of a method shows."""

    method: str
    message: MessageType
    undo: MessageType | None
    location: str


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
        sendings: tuple[Sending, ...],
    ) -> None:
        self.cls, self.saga_type, self.key_field, self.version = cls, saga_type, key_field, version
        self.parallel, self.restartable, self.location = parallel, restartable, location
        self.states, self.handlers, self.routes, self.policies = (
            states,
            tuple(handlers),
            routes,
            policies,
        )
        self.sendings = sendings
        self.final = frozenset(name for name, state in states.items() if state.final)
        self.timeouts = frozenset(h.trigger for h in handlers if h.kind == "timeout")
        self.key_names = frozenset(route.key_name for route in routes.values() if route.key_name)
        self.starts = {h.trigger: h for h in handlers if h.starts}
        self._table = {(state, h.kind, h.trigger): h for h in handlers for state in h.when}
        self.reachable = {name: _reach(name, self.handlers) for name in states}
        self._encode = msgspec.json.Encoder(order="deterministic").encode
        self._decode: Callable[[bytes], Saga] = msgspec.json.Decoder(cls).decode

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
            info = next(f for f in _fields(self.cls) if f.name == self.key_field)
            return self.cls(**{self.key_field: msgspec.convert(key, info.type, strict=False)})
        except (msgspec.ValidationError, TypeError) as error:
            raise DecodeError(
                f"{self.saga_type}: key {key!r} does not fit {self.key_field}: {error}"
            ) from error

    def encode(self, saga: Saga) -> bytes:
        """A saga's data as JSON with sorted keys. Raises HandlerError for values that do not fit."""
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


def _fields(cls: type) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(cast("type[msgspec.Struct]", cls))


def _reach(start: str, handlers: Iterable[Handler]) -> frozenset[str]:
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


# ------------------------------------------------------------------------------------- validation


def build(
    cls: type[Saga],
    *,
    key: str,
    name: str,
    version: int,
    parallel: bool,
    restartable: bool,
    location: str,
) -> Definition:
    """The definition of a saga class. Raises DefinitionError, naming file and line."""
    return _Builder(cls, name, location).build(
        key=key, version=version, parallel=parallel, restartable=restartable
    )


class _Builder:
    """Collects the parts of one class and complains about them one by one."""

    def __init__(self, cls: type[Saga], name: str, location: str) -> None:
        self.cls, self.name, self.location = cls, name, location
        self.members: dict[str, Any] = {}
        self.policies: list[Policy] = []
        for base in reversed(cls.__mro__):
            if issubclass(base, Saga) and base is not Saga:
                self.members.update(vars(base))
                self.policies.extend(vars(base).get(POLICIES, ()))
        self.states = {n: v for n, v in self.members.items() if isinstance(v, State)}
        self.sources = {n: _Source(n, v) for n, v in self.members.items() if inspect.isfunction(v)}

    def fail(self, text: str, location: str = "") -> DefinitionError:
        return DefinitionError(f"saga {self.name}: {text}", location or self.location)

    def build(self, *, key: str, version: int, parallel: bool, restartable: bool) -> Definition:
        self.check_fields(key)
        if not self.states:
            raise self.fail(
                "expected at least one State() attribute, got none; write e.g. done = State(final=True)"
            )
        handlers = list(self.handlers())
        routes = self.routes(key)
        self.check_table(handlers)
        self.check_graph(handlers)
        self.check_sources(handlers, routes)
        return Definition(
            self.cls,
            saga_type=self.name,
            key_field=key,
            version=version,
            parallel=parallel,
            restartable=restartable,
            location=self.location,
            states=self.states,
            handlers=handlers,
            routes=routes,
            policies=self.policy_table(),
            sendings=tuple(s for source in self.sources.values() for s in source.sendings()),
        )

    def check_fields(self, key: str) -> None:
        checked_id(self.name, "saga name")
        fields = tuple(self.cls.__struct_fields__)  # type: ignore[attr-defined]
        if key and key not in fields:
            raise self.fail(
                f"key field {key!r} is not declared; expected one of {', '.join(fields) or 'none'}; "
                f"add the annotation {key}: str"
            )
        try:
            infos = _fields(self.cls)
        except NameError as error:
            raise self.fail(
                f"a field has a type that cannot be resolved: {error}; expected a type at module level"
            ) from error
        for info in infos:
            if info.required and info.name != key:
                raise self.fail(
                    f"field {info.name!r} has no default; expected one, because an instance is created "
                    "before any handler fills it"
                )
        try:
            msgspec.json.Decoder(self.cls)
        except TypeError as error:
            raise self.fail(f"a field has a type that cannot be stored: {error}") from error

    def declared(self) -> Iterator[tuple[str, Callable[..., Any], Declared]]:
        for name, member in self.members.items():
            for declared in getattr(member, DECLARED, ()) if inspect.isfunction(member) else ():
                yield name, member, declared

    def handlers(self) -> Iterator[Handler]:
        open_states = tuple(n for n, s in self.states.items() if not s.final)
        for name, function, declared in self.declared():
            trigger = self.trigger(declared)
            when = self.names(declared, declared.when, "when")
            for state in when or ():
                if self.states[state].final:
                    raise self.fail(
                        f"handler {name} handles {trigger} in the final state {state!r}; expected a state "
                        "that is not final: nothing happens after the end",
                        declared.location,
                    )
            goto = self.names(declared, declared.goto, "goto") or ()
            if declared.starts and not goto:
                raise self.fail(
                    f"handler {name} starts the saga but has no goto=; expected the first state",
                    declared.location,
                )
            if when is None:
                when = () if declared.starts else open_states
            yield Handler(
                name=name,
                function=function,
                kind=declared.kind,
                trigger=trigger,
                when=when,
                goto=goto,
                starts=declared.starts,
                takes=self.takes(name, function, declared),
                location=declared.location,
                compensates=self.sources[name].compensates,
            )

    def trigger(self, declared: Declared) -> str:
        trigger: object = declared.trigger
        wanted: type[Message] = Event if declared.kind == "event" else Command
        if declared.kind == "timeout":
            expected = "a name"
            if isinstance(trigger, str):
                return checked_id(trigger, f"{self.location}: saga {self.name}: timeout name")
        else:
            expected = f"{wanted.__name__} classes"
            if isinstance(trigger, type) and issubclass(trigger, wanted):
                return message_type(trigger).name
        decorator = "on" if declared.kind == "event" else f"on_{declared.kind}"
        raise self.fail(f"@{decorator} expects {expected}, got {trigger!r}", declared.location)

    def names(
        self, declared: Declared, states: tuple[State, ...] | None, keyword: str
    ) -> tuple[str, ...] | None:
        if states is None:
            return None
        for state in states:
            if self.states.get(getattr(state, "name", "")) is not state:
                raise self.fail(
                    f"{keyword}={state!r} is not a state of this saga; expected one of {', '.join(self.states)}",
                    declared.location,
                )
        return tuple(state.name for state in states)

    def takes(self, name: str, function: Callable[..., Any], declared: Declared) -> bool:
        parameters = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
        if len(parameters) not in (1, 2):
            raise self.fail(
                f"handler {name} takes {len(parameters)} arguments; expected self, or self and the message",
                declared.location,
            )
        return len(parameters) == 2

    def routes(self, key: str) -> dict[str, Route]:
        routes: dict[str, tuple[Route, str]] = {}
        for name, _, declared in self.declared():
            if declared.kind != "event":
                continue
            event: type[Event] = declared.trigger
            fields: tuple[str, ...] = event.__struct_fields__  # type: ignore[attr-defined]
            field: KeyOf | None = declared.field
            key_name = "" if declared.key in (None, key) else str(declared.key)
            if field is None:
                wanted = key_name or key
                field = wanted if wanted in fields else None
            if (
                isinstance(field, str)
                and field not in fields
                or (field is None and (key_name or declared.starts and key))
            ):
                raise self.fail(
                    f"handler {name}: event {message_type(event).name} has no field "
                    f"{(declared.field or key_name or key)!r} to correlate by; expected one of "
                    f"{', '.join(fields) or 'none'}; name it with field=",
                    declared.location,
                )
            if key_name and declared.starts:
                raise self.fail(
                    f"handler {name} starts the saga by the further key {key_name!r}; expected the saga's own "
                    f"key {key!r}: it names the new instance",
                    declared.location,
                )
            route = Route(event, key_name, field, declared.starts, declared.missing)
            known, where = routes.get(message_type(event).name, (route, ""))
            if known.event is not event:
                raise self.fail(
                    f"two event classes are called {message_type(event).name!r}", declared.location
                )
            if (known.key_name, known.field) != (route.key_name, route.field):
                raise self.fail(
                    f"event {message_type(event).name} is correlated in two ways, here and at {where}; "
                    "expected the same key= and field= everywhere",
                    declared.location,
                )
            merged = Route(
                event,
                key_name,
                field,
                route.starts or known.starts,
                route.missing if route.missing != "wait" else known.missing,
            )
            routes[message_type(event).name] = (merged, declared.location)
        return {name: route for name, (route, _) in routes.items()}

    def check_table(self, handlers: list[Handler]) -> None:
        seen: dict[tuple[str, str, str], Handler] = {}
        for handler in handlers:
            places = [(state, handler.kind, handler.trigger) for state in handler.when]
            if handler.starts:
                places.append(("(start)", handler.kind, handler.trigger))
            for place in places:
                other = seen.setdefault(place, handler)
                if other is not handler:
                    raise self.fail(
                        f"{handler.trigger} in state {place[0]!r} has two handlers, {other.name} at {other.location} "
                        f"and {handler.name}; expected one; narrow one of them with when=",
                        handler.location,
                    )
        if not any(handler.starts for handler in handlers):
            raise self.fail("no event starts it; expected an @on(..., starts=True, goto=...)")

    def check_graph(self, handlers: list[Handler]) -> None:
        reached: set[str] = set()
        for handler in handlers:
            if handler.starts:
                for target in handler.goto:
                    reached |= {target} | _reach(target, handlers)
        for name, state in self.states.items():
            if name not in reached:
                raise self.fail(
                    f"state {name!r} is unreachable; expected a handler with goto={name} on a way from the start",
                    state.location,
                )
        for name, state in self.states.items():
            leaves = any(
                name in h.when and (h.compensates or any(t != name for t in h.goto))
                for h in handlers
            )
            if not state.final and not leaves:
                raise self.fail(
                    f"state {name!r} is not final and nobody leaves it; expected a handler with when={name} and "
                    "another goto=, or State(final=True)",
                    state.location,
                )

    def policy_table(self) -> dict[tuple[str, str], Literal["ignore", "defer"]]:
        table: dict[tuple[str, str], Literal["ignore", "defer"]] = {}
        for policy in self.policies:
            event: object = policy.event
            if not (isinstance(event, type) and issubclass(event, Event)):
                raise self.fail(
                    f"{policy.kind}() expects event classes, got {policy.event!r}", policy.location
                )
            states = policy.when if policy.when is not None else tuple(self.states.values())
            for state in states:
                if self.states.get(getattr(state, "name", "")) is not state:
                    raise self.fail(
                        f"{policy.kind}(when={state!r}) is not a state of this saga; "
                        f"expected one of {', '.join(self.states)}",
                        policy.location,
                    )
                table[state.name, message_type(policy.event).name] = policy.kind
        return table

    def check_sources(self, handlers: list[Handler], routes: dict[str, Route]) -> None:
        key_names = {route.key_name for route in routes.values() if route.key_name}
        timeouts = {h.trigger: h.location for h in handlers if h.kind == "timeout"}
        targets: dict[str, set[str]] = {}
        for handler in handlers:
            targets.setdefault(handler.name, set()).update(handler.goto or handler.when)
        for name, source in self.sources.items():
            for state, location in source.gotos if name in targets else ():
                if state not in targets[name]:
                    raise self.fail(
                        f"handler {name} goes to {state!r}, which is not declared; expected one of "
                        f"{', '.join(sorted(targets[name])) or 'none'}; add it to goto=",
                        location,
                    )
            for timeout, location in source.timeouts:
                if timeout is not None and timeout not in timeouts:
                    raise self.fail(
                        f"{name} sets timeout {timeout!r}, which nobody handles; expected one of "
                        f"{', '.join(sorted(timeouts)) or 'none'}; add @on_timeout({timeout!r})",
                        location,
                    )
            for key_name, location in source.correlations:
                if key_name not in key_names:
                    raise self.fail(
                        f"{name} correlates by {key_name!r}, which no handler looks by; expected one of "
                        f"{', '.join(sorted(key_names)) or 'none'}; add key={key_name!r} to an @on",
                        location,
                    )
        calls = [call for source in self.sources.values() for call in source.timeouts]
        readable = all(source.readable for source in self.sources.values())
        for timeout, location in timeouts.items():
            if readable and all(call[0] not in (timeout, None) for call in calls):
                raise self.fail(
                    f"timeout {timeout!r} is handled but never set; expected a self.set_timeout({timeout!r}, ...)",
                    location,
                )


class _Source:
    """What the source text of one method shows. Where there is no source, it shows nothing."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        code = function.__code__
        self.file, self.line = code.co_filename, code.co_firstlineno
        self.calls: list[ast.Call] = []
        self.readable = True
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError, TypeError, ValueError):
            self.readable = False
            return
        self.calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
        ]

    def named(self, method: str) -> Iterator[tuple[ast.Call, str]]:
        for call in self.calls:
            assert isinstance(call.func, ast.Attribute)
            if call.func.attr == method:
                yield call, f"{self.file}:{self.line + call.lineno - 1}"

    @property
    def compensates(self) -> bool:
        """Without source, the benefit of the doubt."""
        return not self.readable or any(True for _ in self.named("compensate"))

    @property
    def gotos(self) -> list[tuple[str, str]]:
        return [
            (call.args[0].attr, location)
            for call, location in self.named("goto")
            if call.args and isinstance(call.args[0], ast.Attribute)
        ]

    def literals(self, method: str) -> list[tuple[str | None, str]]:
        found: list[tuple[str | None, str]] = []
        for call, location in self.named(method):
            first = (
                call.args[0]
                if call.args
                else next((k.value for k in call.keywords if k.arg == "name"), None)
            )
            value = first.value if isinstance(first, ast.Constant) else None
            found.append((value if isinstance(value, str) else None, location))
        return found

    @property
    def timeouts(self) -> list[tuple[str | None, str]]:
        return self.literals("set_timeout")

    @property
    def correlations(self) -> list[tuple[str, str]]:
        return [
            (name, location) for name, location in self.literals("correlate") if name is not None
        ]

    def sendings(self) -> Iterator[Sending]:
        for method in ("send", "publish"):
            for call, location in self.named(method):
                message = self.message_class(call.args[0]) if call.args else None
                undo = next(
                    (self.message_class(k.value) for k in call.keywords if k.arg == "undo"), None
                )
                if message is not None:
                    yield Sending(self.name, message, undo, location)

    def message_class(self, node: ast.expr) -> MessageType | None:
        """The class of ``Name(...)`` or ``module.Name(...)``, looked up as the method would."""
        if not isinstance(node, ast.Call):
            return None
        path: list[str] = []
        target = node.func
        while isinstance(target, ast.Attribute):
            path.append(target.attr)
            target = target.value
        if not isinstance(target, ast.Name):
            return None
        closure = inspect.getclosurevars(self.function)
        value = {**closure.builtins, **closure.globals, **closure.nonlocals}.get(target.id)
        for attribute in reversed(path):
            value = getattr(value, attribute, None)
        if isinstance(value, type) and issubclass(value, Message):
            return message_type(value)
        return None


def describe(definition: Definition, envelope: Envelope) -> str:
    """``Type 'key' got message``: how errors and logs name a step."""
    return f"{definition.saga_type} {envelope.saga_key!r} got {envelope.type} {envelope.id}"
