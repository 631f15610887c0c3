"""What the source text of a saga's methods shows, read once while the class is validated.

Only what stands there plainly is taken: literal names, states named as attributes, messages built on
the spot or in a local variable. Where there is no source, or where ``self`` is handed to other code,
nothing is concluded.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from sagacity.core.messages import Message, MessageType, message_type


class Sending(msgspec.Struct, frozen=True):
    """A ``self.send`` or ``self.publish`` that the source of a method shows."""

    method: str
    message: MessageType
    undo: MessageType | None
    location: str


class Source:
    """The source of one method."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = inspect.unwrap(function)
        code = self.function.__code__
        self.file, self.line = code.co_filename, code.co_firstlineno
        self.location = f"{self.file}:{self.line}"
        self.tree = _parse(self.function)
        self.receiver = _receiver(self.tree)
        nodes = [] if self.tree is None else list(ast.walk(self.tree))
        self._calls = [node for node in nodes if isinstance(node, ast.Call)]
        self._assigned: dict[str, list[ast.expr]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self._assigned.setdefault(target.id, []).append(node.value)

    @property
    def readable(self) -> bool:
        """False where there is no source, as for code made at run time."""
        return self.tree is not None

    @property
    def opaque(self) -> bool:
        """True where the saga is handed to code outside, or the source cannot be read."""
        return not self.readable or any(
            self._is_self(value) or (isinstance(call.func, ast.Name) and call.func.id == "super")
            for call in self._calls
            for value in [*call.args, *(keyword.value for keyword in call.keywords), call.func]
        )

    @property
    def own_calls(self) -> set[str]:
        """Names of the methods of the saga that it calls."""
        return {name for name, _, _ in self._self_calls()}

    @property
    def gotos(self) -> list[tuple[str, bool, str]]:
        """(attribute, whether of ``self``, ``file:line``) of each state that it goes to."""
        return [
            (call.args[0].attr, self._is_self(call.args[0].value), location)
            for name, call, location in self._self_calls()
            if name == "goto" and call.args and isinstance(call.args[0], ast.Attribute)
        ]

    def literals(self, method: str) -> list[tuple[str | None, str]]:
        """(first argument if it is plain text, ``file:line``) of each call of ``self.method``."""
        found: list[tuple[str | None, str]] = []
        for name, call, location in self._self_calls():
            if name != method:
                continue
            named = (keyword.value for keyword in call.keywords if keyword.arg == "name")
            first = call.args[0] if call.args else next(named, None)
            value = first.value if isinstance(first, ast.Constant) else None
            found.append((value if isinstance(value, str) else None, location))
        return found

    def sendings(self) -> Iterator[Sending]:
        """What it sends and publishes."""
        for name, call, location in self._self_calls():
            if name not in {"send", "publish"} or not call.args:
                continue
            undo = next((k.value for k in call.keywords if k.arg == "undo"), None)
            undone = None if undo is None else next(self._messages(undo), None)
            for message in self._messages(call.args[0]):
                yield Sending(self.name, message, undone, location)

    def _self_calls(self) -> Iterator[tuple[str, ast.Call, str]]:
        for call in self._calls:
            if isinstance(call.func, ast.Attribute) and self._is_self(call.func.value):
                yield call.func.attr, call, f"{self.file}:{self.line + call.lineno - 1}"

    def _is_self(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.receiver

    def _messages(self, node: ast.expr) -> Iterator[MessageType]:
        """The classes of ``Name(...)``, ``module.Name(...)`` or ``Name.make(...)``."""
        match node:
            case ast.Call(func=function):
                yield from self._message_class(function)
            case ast.IfExp(body=body, orelse=orelse):
                yield from self._messages(body)
                yield from self._messages(orelse)
            case ast.Name(id=name):
                for value in self._assigned.get(name, ()):
                    if not isinstance(value, ast.Name):
                        yield from self._messages(value)
            case _:
                pass

    def _message_class(self, node: ast.expr) -> Iterator[MessageType]:
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return
        value = self._lookup(node.id)
        for attribute in reversed(path):
            if inspect.isclass(value) and issubclass(value, Message):
                break
            value = getattr(value, attribute, None)
        if inspect.isclass(value) and issubclass(value, Message):
            yield message_type(value)

    def _lookup(self, name: str) -> Any:
        """A name as the method itself would find it."""
        free = self.function.__code__.co_freevars
        for variable, cell in zip(free, self.function.__closure__ or (), strict=False):
            if variable == name:
                try:
                    return cell.cell_contents
                except ValueError:  # not assigned yet
                    return None
        return self.function.__globals__.get(name, getattr(builtins, name, None))


def compensating(sources: Mapping[str, Source]) -> set[str]:
    """The methods that compensate, or may: on their own or through another method."""
    found = {
        name
        for name, source in sources.items()
        if source.opaque or "compensate" in source.own_calls
    }
    while more := {
        name
        for name, source in sources.items()
        if name not in found and not found.isdisjoint(source.own_calls)
    }:
        found |= more
    return found


def _parse(function: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The tree of a method, its first line counted as 1."""
    try:
        text = inspect.getsource(function)
        indented = text[:1].isspace()
        # A body keeps text that is less indented than the code, such as a quoted letter.
        body = ast.parse(f"class _:\n{text}" if indented else text).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    found: ast.stmt = body[0]
    if indented and isinstance(found, ast.ClassDef):
        found = ast.increment_lineno(found, -1).body[0]
    return found if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _receiver(tree: ast.FunctionDef | ast.AsyncFunctionDef | None) -> str:
    """What the method calls its saga."""
    if tree is None:
        return ""
    parameters = [*tree.args.posonlyargs, *tree.args.args]
    return parameters[0].arg if parameters else ""
