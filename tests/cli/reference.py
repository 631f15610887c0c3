"""Writes the reference pages of the two commands: ``python -m tests.cli.reference``.

The pages are made of what the programs declare, so they cannot be out of date: a test compares them.
They are tables of ours, since the layout of ``--help`` changes with releases of click.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import click

from sagacity.cli import operator, worker
from sagacity.cli.exits import MEANINGS
from sagacity.cli.options import SettingOption
from sagacity.worker.config import Field, fields

PAGES = Path(__file__).parents[2] / "docs" / "reference"


def worker_page() -> str:
    """``docs/reference/saga-worker.md``."""
    lines = [
        "# saga-worker",
        "",
        "```text",
        _usage(worker.main, "saga-worker"),
        "```",
        "",
        *_text(worker.main),
        "`python -m sagacity` is the same command.",
        "",
        *_options(worker.main.params),
        "",
        "## Settings",
        "",
        "Each is a flag and a variable: `SAGACITY_BATCH_MAX` for `--batch-max`. A flag goes before",
        "its variable, a variable before the file that `SAGACITY_STORE_FILE` or `SAGACITY_BUS_FILE`",
        "names, and that before the default. An empty variable counts as unset. A `SAGACITY_`",
        "variable that nothing reads is warned of at the start. In code the same names are fields of",
        "`sagacity.worker.config.Settings`, checked the same way.",
        "",
    ]
    for section, chosen in groupby(fields(), key=lambda field: field.section):
        lines += [f"### {section}", "", "| Flag | Default | Takes | |", "|---|---|---|---|"]
        lines += [_setting(field) for field in chosen]
        lines.append("")
    return "\n".join([*lines, *_exits(), ""])


def operator_page() -> str:
    """``docs/reference/saga.md``."""
    lines = [
        "# saga",
        "",
        *_text(operator.main),
        "Every command takes `--store URL`; without it `SAGACITY_STORE` names the store, or the file",
        "that `SAGACITY_STORE_FILE` names. With `--json` the answer is one JSON document. Whatever",
        "comes from a message is escaped before it reaches the terminal. `NO_COLOR` is honoured, and",
        "tables are drawn by rich where `sagacity[rich]` is installed.",
    ]
    for name, command in _commands(operator.main, "saga"):
        lines += ["", f"## {name}", "", "```text", _usage(command, name), "```", ""]
        lines += [*_text(command), *_options(command.params)]
    return "\n".join([*lines, "", *_exits(), ""])


def pages() -> dict[Path, str]:
    """Path -> what belongs there."""
    return {PAGES / "saga-worker.md": worker_page(), PAGES / "saga.md": operator_page()}


def _commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    for part in sorted(group.commands):
        command = group.commands[part]
        if isinstance(command, click.Group):
            yield from _commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def _usage(command: click.Command, name: str) -> str:
    arguments = [
        p.metavar or (p.name or "").upper() for p in command.params if isinstance(p, click.Argument)
    ]
    return " ".join([name, "[OPTIONS]", *arguments])


def _text(command: click.Command) -> list[str]:
    return [*inspect.cleandoc(command.help or "").splitlines(), ""]


def _options(params: Iterable[click.Parameter]) -> list[str]:
    rows: list[str] = []
    for param in params:
        if not isinstance(param, click.Option) or isinstance(param, SettingOption):
            continue
        assert param.help or param.name == "version", f"{param.name} has no help text"
        names = ", ".join(f"`{name}`" for name in sorted(param.opts, key=len))
        if not param.is_flag:
            names += f" {_cell(_metavar(param))}"
        needed = " Required." if param.required else ""
        rows.append(f"| {names} | {_cell(param.help or '')}{needed} |")
    return ["| Option | |", "|---|---|", *sorted(rows)] if rows else []


def _metavar(param: click.Option) -> str:
    if isinstance(param.type, click.Choice):
        return "|".join(str(choice) for choice in param.type.choices)
    return param.metavar or "TEXT"


def _setting(field: Field) -> str:
    default = field.text(field.default)
    shown = f"`{default}`" if default else "empty"
    return f"| `{field.flag}` | {shown} | {_cell(field.expected)} | {_cell(field.description)} |"


def _exits() -> list[str]:
    rows = [f"| {status.value} | {_cell(text)} |" for status, text in MEANINGS.items()]
    return ["## Exit status", "", "| Status | Meaning |", "|---|---|", *rows]


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_\\])", r"\\\1", re.sub(r"\s+", " ", text))


if __name__ == "__main__":
    PAGES.mkdir(parents=True, exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
