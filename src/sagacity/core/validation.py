"""Everything that can be wrong with a saga class, said while the class statement runs.

A saga that could not work never comes into being; every complaint names file and line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeGuard, TypeVar

import msgspec

from sagacity.core.definition import Definition, Handler, Route, fields_of, reach
from sagacity.core.delivery import checked_id
from sagacity.core.errors import DecodeError, DefinitionError
from sagacity.core.messages import Command, CommandDone, CommandFailed, Event, Message, message_type
from sagacity.core.saga import (
    DECLARED,
    POLICIES,
    RESERVED,
    Declared,
    KeyOf,
    Policy,
    Saga,
    State,
)
from sagacity.core.source import Source, compensating

M = TypeVar("M", bound=Message)

_SAGA_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,126}\Z")


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
        self.declarations: dict[str, tuple[Declared, ...]] = {}
        own = [base for base in cls.__mro__ if base not in Saga.__mro__]
        for base in reversed(own):  # mixins may bring handlers too
            for member_name, member in vars(base).items():
                self.members[member_name] = member
                # An override without a decorator keeps what it overrides; `name = None` drops it.
                inherited = self.declarations.get(member_name, ())
                declared = tuple(getattr(member, DECLARED, ())) or inherited
                self.declarations[member_name] = declared if inspect.isfunction(member) else ()
            self.policies.extend(vars(base).get(POLICIES, ()))
        self.states = {n: v for n, v in self.members.items() if isinstance(v, State)}
        self.sources = {n: Source(n, v) for n, v in self.members.items() if inspect.isfunction(v)}

    def fail(self, text: str, location: str = "") -> DefinitionError:
        return DefinitionError(f"saga {self.name}: {text}", location or self.location)

    def build(self, *, key: str, version: int, parallel: bool, restartable: bool) -> Definition:
        self.check_name(version)
        self.check_reserved()
        self.check_fields(key)
        self.check_states()
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
            policies=self.policy_table(handlers),
            sources=self.sources,
        )

    # ------------------------------------------------------------------------------ names and data

    def check_name(self, version: int) -> None:
        if not _SAGA_TYPE.match(self.name):
            raise self.fail(
                "expected a name of 1-127 letters, digits and ._:- that starts with a letter, got "
                f"{self.name!r}; give it one with name="
            )
        if version < 1:
            raise self.fail(f"expected a version of 1 or more, got {version}")

    def check_reserved(self) -> None:
        """Nothing may hide what a handler calls."""
        for name in [*fields_names(self.cls), *self.members]:
            if name not in RESERVED:
                continue
            member = self.members.get(name)
            what, location = "field", ""
            if isinstance(member, State):
                what, location = "state", member.location
            elif inspect.isfunction(member):
                what, location = "method", self.sources[name].location
            raise self.fail(
                f"{name!r} is what a handler calls as self.{name}; expected another name for the {what}",
                location,
            )

    def check_fields(self, key: str) -> None:
        fields = fields_names(self.cls)
        if key and key not in fields:
            raise self.fail(
                f"key field {key!r} is not declared; expected one of {', '.join(fields) or 'none'}; "
                f"add the annotation {key}: str"
            )
        try:
            infos = fields_of(self.cls)
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

    def check_states(self) -> None:
        if not self.states:
            raise self.fail(
                "expected at least one State() attribute, got none; "
                "write e.g. done = State(final=True)"
            )
        for name, state in self.states.items():
            if state.name != name:
                raise self.fail(
                    f"state {name!r} is called {state.name or 'nothing'!r} too; expected a State() of "
                    "its own for each name",
                    state.location,
                )

    # ------------------------------------------------------------------------------------ handlers

    def declared(self) -> Iterator[tuple[str, Callable[..., Any], Declared]]:
        for name, declarations in self.declarations.items():
            for declared in declarations:
                yield name, self.members[name], declared

    def handlers(self) -> Iterator[Handler]:
        open_states = tuple(n for n, s in self.states.items() if not s.final)
        compensates = compensating(self.sources)
        for name, function, declared in self.declared():
            trigger = self.trigger(declared)
            when = self.names(declared, declared.when, "when")
            for state in when or ():
                if self.states[state].final:
                    raise self.fail(
                        f"handler {name} handles {trigger} in the final state {state!r}; expected a "
                        "state that is not final: nothing happens after the end",
                        declared.location,
                    )
            if when == () and not declared.starts:
                raise self.fail(
                    f"handler {name} handles {trigger} in no state, when=() is empty; expected states, "
                    "or no when= for every state that is not final",
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
                compensates=name in compensates,
            )

    def trigger(self, declared: Declared) -> str:
        trigger: object = declared.trigger
        decorator = "on" if declared.kind == "event" else f"on_{declared.kind}"
        if declared.kind == "timeout":
            try:
                if isinstance(trigger, str):
                    return checked_id(trigger, "timeout name")
            except DecodeError as error:
                raise self.fail(f"@{decorator}: {error}", declared.location) from error
            expected = "the name of a timeout"
        elif declared.kind == "event":
            for command_type, other in ((CommandDone, "on_done"), (CommandFailed, "on_failure")):
                if trigger is command_type:
                    raise self.fail(
                        f"@on does not take {command_type.__name__}; expected @{other}(TheCommand)",
                        declared.location,
                    )
            if _is_message(trigger, Event):
                return message_type(trigger).name
            expected = "event classes"
        else:
            if _is_message(trigger, Command):
                return message_type(trigger).name
            expected = "command classes"
        raise self.fail(f"@{decorator} expects {expected}, got {trigger!r}", declared.location)

    def names(
        self, declared: Declared, states: tuple[State, ...] | None, keyword: str
    ) -> tuple[str, ...] | None:
        if states is None:
            return None
        return tuple(dict.fromkeys(self.state(s, keyword, declared.location) for s in states))

    def state(self, state: object, keyword: str, location: str) -> str:
        if not isinstance(state, State) or self.states.get(state.name) is not state:
            raise self.fail(
                f"{keyword}={state!r} is not a state of this saga; "
                f"expected one of {', '.join(self.states)}",
                location,
            )
        return state.name

    def takes(self, name: str, function: Callable[..., Any], declared: Declared) -> bool:
        parameters = inspect.signature(function).parameters.values()
        positional = [
            p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
        ]
        required = [p for p in positional if p.default is p.empty]
        left = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if left or not positional or len(required) > 2:
            got = ", ".join([*(p.name for p in positional), *(f"*, {one}" for one in left)])
            raise self.fail(
                f"handler {name} takes ({got}); expected (self) or (self, message)",
                declared.location,
            )
        return rest or len(positional) >= 2

    # ------------------------------------------------------------------------------ routes, policies

    def routes(self, key: str) -> dict[str, Route]:
        routes: dict[str, tuple[Route, str]] = {}
        for name, _, declared in self.declared():
            if declared.kind != "event":
                continue
            route = self.route(name, declared, key)
            type_name = message_type(route.event).name
            known, where = routes.get(type_name, (route, ""))
            if known.event is not route.event:
                raise self.fail(
                    f"two event classes are called {type_name!r}, at "
                    f"{message_type(known.event).location} and "
                    f"{message_type(route.event).location}; expected one class for each name",
                    declared.location,
                )
            if (known.key_name, known.field) != (route.key_name, route.field):
                raise self.fail(
                    f"event {type_name} is correlated in two ways, here and at {where}; "
                    "expected the same key= and field= everywhere",
                    declared.location,
                )
            missing = {known.missing, route.missing} - {"wait"}
            if len(missing) > 1:
                raise self.fail(
                    f"event {type_name} has missing={route.missing!r} here and {known.missing!r} at "
                    f"{where}; expected one policy for each event",
                    declared.location,
                )
            merged = msgspec.structs.replace(
                route,
                starts=route.starts or known.starts,
                missing=known.missing if known.missing in missing else route.missing,
            )
            routes[type_name] = (merged, declared.location)
        return {name: route for name, (route, _) in routes.items()}

    def route(self, name: str, declared: Declared, key: str) -> Route:
        event: type[Event] = declared.trigger
        type_name, fields = message_type(event).name, fields_names(event)
        key_name = "" if declared.key in {None, key} else str(declared.key)
        field: KeyOf | None = declared.field
        if field is None:
            wanted = key_name or key
            field = wanted if wanted in fields else None
            needed = key_name or (key if declared.starts else "")
            unknown = needed if field is None else ""
        else:
            unknown = field if isinstance(field, str) and field not in fields else ""
        if unknown:
            raise self.fail(
                f"handler {name}: event {type_name} has no field {unknown!r} to correlate by; "
                f"expected one of {', '.join(fields) or 'none'}; name it with field=",
                declared.location,
            )
        if key_name and declared.starts:
            raise self.fail(
                f"handler {name} starts the saga by the further key {key_name!r}; expected the saga's "
                f"own key {key!r}: it names the new instance",
                declared.location,
            )
        return Route(event, key_name, field, declared.starts, declared.missing)

    def policy_table(
        self, handlers: list[Handler]
    ) -> dict[tuple[str, str], Literal["ignore", "defer"]]:
        table: dict[tuple[str, str], Policy] = {}
        handled = {(state, h.trigger) for h in handlers if h.kind == "event" for state in h.when}
        for policy in self.policies:
            event: object = policy.event
            if not _is_message(event, Event):
                raise self.fail(
                    f"{policy.kind}() expects event classes, got {event!r}", policy.location
                )
            trigger = message_type(event).name
            states = policy.when if policy.when is not None else tuple(self.states.values())
            for one in states:
                state = self.state(one, f"{policy.kind}() when", policy.location)
                place = (state, trigger)
                if policy.when is not None and place in handled:
                    raise self.fail(
                        f"{policy.kind}() names {trigger} in state {state!r}, which has a handler for "
                        "it; expected a state without one",
                        policy.location,
                    )
                later = any((s, trigger) in handled for s in reach(state, handlers))
                if policy.kind == "defer" and policy.when is not None and not later:
                    raise self.fail(
                        f"defer() keeps {trigger} in state {state!r}, but no state that can follow "
                        "handles it; expected an @on for it there, or ignore()",
                        policy.location,
                    )
                known = table.get(place)
                if known is not None and known.kind != policy.kind and _as_wide(known, policy):
                    raise self.fail(
                        f"{trigger} in state {state!r} is both ignored and deferred, here and at "
                        f"{known.location}; expected one of them",
                        policy.location,
                    )
                if known is None or known.when is None or policy.when is not None:
                    table[place] = policy
        return {place: policy.kind for place, policy in table.items()}

    # ------------------------------------------------------------------------- the class as a whole

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
                        f"{handler.trigger} in state {place[0]!r} has two handlers, {other.name} at "
                        f"{other.location} and {handler.name}; expected one; narrow one of them "
                        "with when=",
                        handler.location,
                    )
        if not any(handler.starts for handler in handlers):
            raise self.fail("no event starts it; expected an @on(..., starts=True, goto=...)")

    def check_graph(self, handlers: list[Handler]) -> None:
        reached: set[str] = set()
        for handler in handlers:
            if handler.starts:
                for target in handler.goto:
                    reached |= {target} | reach(target, handlers)
        for name, state in self.states.items():
            if name not in reached:
                raise self.fail(
                    f"state {name!r} is unreachable; expected a handler with goto={name} on a way "
                    "from the start",
                    state.location,
                )
        for name, state in self.states.items():
            leaves = any(
                name in h.when and (h.compensates or any(t != name for t in h.goto))
                for h in handlers
            )
            if not state.final and not leaves:
                raise self.fail(
                    f"state {name!r} is not final and nobody leaves it; expected a handler with "
                    f"when={name} and another goto=, or State(final=True)",
                    state.location,
                )

    def check_sources(self, handlers: list[Handler], routes: dict[str, Route]) -> None:
        key_names = {route.key_name for route in routes.values() if route.key_name}
        timeouts = {h.trigger: h.location for h in handlers if h.kind == "timeout"}
        targets: dict[str, set[str]] = {}
        for handler in handlers:
            targets.setdefault(handler.name, set()).update(handler.goto or handler.when)
        for name, source in self.sources.items():
            for attribute, own, location in source.gotos if name in targets else ():
                is_state = attribute in self.states or (own and not hasattr(self.cls, attribute))
                if is_state and attribute not in targets[name]:
                    raise self.fail(
                        f"handler {name} goes to {attribute!r}, which is not declared; expected one of "
                        f"{', '.join(sorted(targets[name])) or 'none'}; add it to goto=",
                        location,
                    )
            for timeout, location in source.literals("set_timeout"):
                if timeout is not None and timeout not in timeouts:
                    raise self.fail(
                        f"{name} sets timeout {timeout!r}, which nobody handles; expected one of "
                        f"{', '.join(sorted(timeouts)) or 'none'}; add @on_timeout({timeout!r})",
                        location,
                    )
            for key_name, location in source.literals("correlate"):
                if key_name is not None and key_name not in key_names:
                    raise self.fail(
                        f"{name} correlates by {key_name!r}, which no handler looks by; expected one "
                        f"of {', '.join(sorted(key_names)) or 'none'}; add key={key_name!r} to an @on",
                        location,
                    )
        if any(source.opaque for source in self.sources.values()):
            return  # whoever is handed the saga may set a timeout
        set_somewhere = {
            name for s in self.sources.values() for name, _ in s.literals("set_timeout")
        }
        for timeout, location in timeouts.items():
            if not {timeout, None} & set_somewhere:
                raise self.fail(
                    f"timeout {timeout!r} is handled but never set; "
                    f"expected a self.set_timeout({timeout!r}, ...)",
                    location,
                )


def fields_names(cls: type[Message | Saga]) -> tuple[str, ...]:
    """The names of the fields of a message or saga class."""
    names: tuple[str, ...] = getattr(cls, "__struct_fields__", ())
    return names


def _is_message(value: object, kind: type[M]) -> TypeGuard[type[M]]:
    return isinstance(value, type) and issubclass(value, kind)


def _as_wide(one: Policy, other: Policy) -> bool:
    """True where neither narrows the other: both name states, or neither does."""
    return (one.when is None) == (other.when is None)
