"""How log records of a worker look: lines for people, or JSON lines for machines.

Code of this package logs a statement and passes what belongs to it in ``extra``::

    log.warning("Store unreachable", extra={"store": shown, "retry_in_s": 1.5})

    2026-11-22 08:10:06.123Z WARNING sagacity.worker  Store unreachable (store=..., retry_in_s=1.5)
    {"time": "2026-11-22T08:10:06.123456Z", "level": "warning", ..., "retry_in_s": 1.5}

Nothing that comes from a message can forge a line, move the cursor or hide text: what does not
print is escaped, long values are cut, and known secrets are replaced.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Final, Literal, TextIO

from sagacity.worker.redaction import scrubbed

__all__ = ["HumanFormatter", "JsonFormatter", "attributes_of", "configure", "escaped", "statement"]

VALUE_CHARACTERS_MAX: Final = 400
"""Longest attribute value in a log line; the rest is cut."""
STATEMENT_CHARACTERS_MAX: Final = 4000
TRACEBACK_CHARACTERS_MAX: Final = 20_000

_STANDARD: Final = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
_CHATTY: Final = ("asyncio", "sqlalchemy", "redis", "watchfiles", "aiosqlite", "httpx", "httpcore")
"""Libraries that log their own work at INFO; they are heard from WARNING on."""
_COLOURS: Final = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


def escaped(text: str, limit: int = VALUE_CHARACTERS_MAX) -> str:
    """`text` on one line and safe on a terminal, cut to about `limit` characters.

    Control characters, line and paragraph separators, ANSI escapes, bidirectional marks, zero-width
    characters and lone surrogates become backslash escapes.
    """
    cut = text[:limit]
    if not cut.isprintable():
        cut = "".join(_escape(c) for c in cut)
    return cut if len(text) <= limit else f"{cut}... ({len(text)} characters)"


def statement(text: str, attributes: Mapping[str, object]) -> str:
    """``Statement (attribute=value, ...)``; values with spaces or punctuation are quoted."""
    if not attributes:
        return text
    listed = ", ".join(f"{escaped(name)}={_value(value)}" for name, value in attributes.items())
    return f"{text} ({listed})"


def attributes_of(record: logging.LogRecord) -> dict[str, object]:
    """What was passed as ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class HumanFormatter(logging.Formatter):
    """One line per record, with the traceback below it; times in UTC."""

    def __init__(
        self, *, secrets: tuple[str, ...] = (), colour: bool = False, pid: bool = False
    ) -> None:
        super().__init__()
        self._secrets = secrets
        self._colour = colour
        self._pid = pid

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        text = escaped(record.getMessage(), STATEMENT_CHARACTERS_MAX)
        line = f"{_time(record, ' ', 3)} {record.levelname:<7} "
        line += f"{record.name}[{record.process}]  " if self._pid else f"{record.name}  "
        line += statement(text, attributes_of(record))
        error = _error_text(record)
        if error:
            line += "\n" + "\n".join(
                "  | " + escaped(part.replace("\t", "    "), STATEMENT_CHARACTERS_MAX)
                for part in error.splitlines()
            )
        line = scrubbed(line, self._secrets)
        code = _COLOURS.get(record.levelname) if self._colour else None
        return f"\x1b[{code}m{line}\x1b[0m" if code else line


class JsonFormatter(logging.Formatter):
    """One JSON object per record; only ASCII, so that no terminal can be fooled."""

    def __init__(self, *, secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, object] = {
            "time": _time(record, "T", 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "statement": self._text(record.getMessage(), STATEMENT_CHARACTERS_MAX),
        }
        for name, value in attributes_of(record).items():
            entry[f"{name}_" if name in entry else name] = self._plain(value)
        if record.exc_info and record.exc_info[1] is not None:
            entry["error_type"] = type(record.exc_info[1]).__name__
            entry["error"] = self._text(str(record.exc_info[1]), STATEMENT_CHARACTERS_MAX)
        error = _error_text(record)
        if error:
            entry["traceback"] = self._text(error, TRACEBACK_CHARACTERS_MAX)
        return json.dumps(entry, ensure_ascii=True, allow_nan=False)

    def _plain(self, value: object) -> object:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        return self._text(value if isinstance(value, str) else str(value), VALUE_CHARACTERS_MAX)

    def _text(self, text: str, limit: int) -> str:
        text = scrubbed(text, self._secrets)
        return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def configure(
    *,
    form: Literal["human", "json"] = "human",
    level: str = "info",
    secrets: tuple[str, ...] = (),
    stream: TextIO | None = None,
    pid: bool = False,
) -> None:
    """Sends all log records of this process to `stream` (default: stderr). For programs only.

    `level` is the least level logged; `secrets` are replaced by ``***`` wherever they turn up.
    `pid` names the process in each line, for several that write to one terminal; JSON always does.
    """
    out: TextIO = sys.stderr if stream is None else stream
    formatter: logging.Formatter
    if form == "json":
        formatter = JsonFormatter(secrets=secrets)
    else:
        colour = out.isatty() and not os.environ.get("NO_COLOR")
        formatter = HumanFormatter(secrets=secrets, colour=colour, pid=pid)
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(handlers=[handler], level=number, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


def _escape(c: str) -> str:
    if c.isprintable():
        return c
    return c.encode("unicode_escape", "surrogatepass").decode("ascii")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = escaped(value if isinstance(value, str) else str(value))
    if text and not any(c in ' ,()="' for c in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _time(record: logging.LogRecord, separator: str, digits: int) -> str:
    whole = time.strftime(f"%Y-%m-%d{separator}%H:%M:%S", time.gmtime(record.created))
    fraction = f"{record.created % 1:.6f}"[2 : 2 + digits]
    return f"{whole}.{fraction}Z"


def _error_text(record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[1] is not None:
        text = "".join(traceback.format_exception(record.exc_info[1]))
    else:
        text = record.exc_text or ""
    if len(text) > TRACEBACK_CHARACTERS_MAX:
        half = TRACEBACK_CHARACTERS_MAX // 2
        text = f"{text[:half]}\n... ({len(text)} characters) ...\n{text[-half:]}"
    return text
