"""The catalog of what is logged, read from the source: docs/reference/log-statements.md."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tests.docs.pages import CHECKOUT

PAGE = CHECKOUT / "docs/reference/log-statements.md"
SOURCE = CHECKOUT / "src"
LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3, "exception": 3}
NAMES = {"exception": "error"}

HEAD = """\
# Log statements

<!-- Made by `python -m tests.docs.generated` from the source. -->

Everything that Sagacity logs, by level. A line is a fixed statement and attributes: `Statement (attribute=value, ...)` for people,
one JSON object for machines (`--log-format json`), where the statement is the field `statement` and each attribute a field.
Search for the statement, filter by attributes. Values that come from messages are escaped and cut.

The logger's name is the module's. The library itself configures no logging; `saga-worker` and `saga` do.

`error` means that somebody should look. `warning` means that something went wrong that is tried again, or is taken care of.
"""


class Logged(msgspec.Struct, frozen=True, order=True):
    """One statement."""

    level: str
    statement: str
    attributes: tuple[str, ...]
    module: str


def _statements(node: ast.expr, functions: dict[str, list[ast.expr]]) -> Iterator[str]:
    """The texts that the first argument of a call can be."""
    match node:
        case ast.Constant(value=str(text)):
            yield text.partition(" (")[0] if "%" in text else text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _statements(body, functions)
            yield from _statements(orelse, functions)
        case ast.Name(id=name):
            for given in functions.get(name, ()):
                if not isinstance(given, ast.Name):
                    yield from _statements(given, functions)
        case _:
            pass


def _attributes(call: ast.Call) -> tuple[str, ...]:
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
            keys = (key for key in keyword.value.keys if isinstance(key, ast.Constant))
            return tuple(str(key.value) for key in keys)
    text = call.args[0]
    if isinstance(text, ast.Constant) and isinstance(text.value, str) and "%" in text.value:
        inside = text.value.partition(" (")[2].rpartition(")")[0]
        return tuple(part.partition("=")[0].strip() for part in inside.split(",") if "=" in part)
    return ()


def logged_by(path: Path) -> Iterator[Logged]:
    """What one module logs."""
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A text that is handed to a function of the same module is found at its callers.
    handed: dict[str, list[ast.expr]] = defaultdict(list)
    functions = {
        node.name: [argument.arg for argument in node.args.args if argument.arg != "self"]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        name = (
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        )
        for parameter, value in zip(functions.get(name, ()), call.args, strict=False):
            handed[parameter].append(value)
    for call in calls:
        match call.func:
            case ast.Attribute(value=ast.Name(id="log" | "logger" | "_log"), attr=level):
                arguments = call.args
                if level == "log":
                    level, arguments = "warning", call.args[1:]
                if level not in LEVELS or not arguments:
                    continue
                for text in _statements(arguments[0], handed):
                    yield Logged(NAMES.get(level, level), text, _attributes(call), module)
            case _:
                pass


def catalog() -> list[Logged]:
    """Every statement, once for each module that makes it."""
    found = {one for path in sorted(SOURCE.rglob("*.py")) for one in logged_by(path)}
    return sorted(found)


def page() -> str:
    """The whole page as it should be now."""
    entries = catalog()
    parts = [HEAD]
    for level in ("error", "warning", "info", "debug"):
        rows = [one for one in entries if one.level == level]
        if rows:
            parts.append(f"## {level}\n\n| Statement | Attributes | Module |\n|---|---|---|")
            parts.extend(
                f"| {one.statement} | {', '.join(f'`{a}`' for a in one.attributes)} | `{one.module}` |"
                for one in rows
            )
            parts.append("")
    return "\n".join(parts)
