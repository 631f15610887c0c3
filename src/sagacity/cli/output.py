"""How the operator's commands print: JSON for programs, tables and text for people.

Whatever comes from a message or a database is escaped, so that it cannot move the cursor, colour the
screen or reverse the reading direction of an operator's terminal.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click
import msgspec

from sagacity.worker.logs import escaped

__all__ = [
    "age",
    "cell",
    "duration",
    "honour_no_color",
    "instant",
    "plain_table",
    "print_json",
    "print_table",
]

_UNITS: Final = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
CELL_CHARACTERS_MAX: Final = 200


def honour_no_color() -> None:
    """Switches colours off for the running command where ``NO_COLOR`` is set."""
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


def print_json(value: Any) -> None:
    """Prints one JSON document, ASCII only where it matters to a terminal."""
    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=str)).decode()
    click.echo("".join(c if c == "\n" or c.isprintable() else _json_escape(c) for c in text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under headings: with rich on a terminal where it is installed, else aligned."""
    cells = [[cell(value) for value in row] for row in rows]
    if _rich_wanted():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in cells:
            table.add_row(*(Text(value) for value in row))
        Console().print(table)
        return
    for line in plain_table(headings, cells):
        click.echo(line)


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of aligned columns."""
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    return [
        "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def cell(value: object) -> str:
    """A value as it may stand in a table: escaped, one line, cut."""
    return escaped(str(value), CELL_CHARACTERS_MAX)


def instant(us: int) -> str:
    """Microseconds since 1970 as ``2026-11-22 08:00:00.123Z``."""
    try:
        moment = datetime.fromtimestamp(us // 1_000_000, UTC)
    except (OverflowError, OSError, ValueError):
        return f"{us} us"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{us % 1_000_000 // 1000:03d}Z"


def duration(us: int) -> str:
    """A length of time in its two largest units: ``3 h 20 min``."""
    seconds = abs(us) // 1_000_000
    if seconds == 0:
        return f"{abs(us) // 1000} ms"
    for index, (size, unit) in enumerate(_UNITS):
        if seconds >= size:
            text = f"{seconds // size} {unit}"
            if index + 1 < len(_UNITS):
                below, name = _UNITS[index + 1]
                rest = seconds % size // below
                text += f" {rest} {name}" if rest else ""
            return text
    return "0 s"


def age(at: int, now: int) -> str:
    """``3 h ago``, ``in 2 d``, or ``now``."""
    if abs(now - at) < 1_000_000:
        return "now"
    return f"{duration(now - at)} ago" if now > at else f"in {duration(at - now)}"


def _json_escape(c: str) -> str:
    pairs = c.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{pairs[i : i + 2].hex()}" for i in range(0, len(pairs), 2))


def _rich_wanted() -> bool:
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return False
    return importlib.util.find_spec("rich") is not None
