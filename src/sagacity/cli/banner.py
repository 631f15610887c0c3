"""What a worker says when it starts: who it is, what it listens to, and within which limits."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import click

from sagacity.core.definition import Definition
from sagacity.service import Service
from sagacity.worker.config import Settings
from sagacity.worker.logs import escaped
from sagacity.worker.redaction import redacted

__all__ = ["banner", "package_version"]

_LABEL: Final = 13


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("sagacity")
    except PackageNotFoundError:
        return "unknown"


def banner(
    service: Service, settings: Settings, *, workers: int = 1, health: str = "", width: int = 100
) -> list[str]:
    """The lines to print, at most `width` characters wide where words allow; styled for click."""
    head = (
        click.style(f"sagacity {package_version()}", bold=True)
        + f"  {service.name}"
        + click.style(f"  pid {os.getpid()}, Python {platform.python_version()}", dim=True)
    )
    lines = ["", head, ""]
    for definition in service.definitions:
        key = f" by {definition.key_field}" if definition.key_field else ""
        lines += _entry("saga", [f"{definition.saga_type}{key}"], width)
        lines += _entry("  states", _states(definition), width)
        lines += _entry("  begins on", sorted(definition.starts), width)
        later = {h.trigger for h in definition.handlers if h.kind == "event"}
        lines += _entry("  hears", sorted(later - set(definition.starts)), width)
        lines += _entry("  sends", sorted({s.message.name for s in definition.sendings}), width)
        lines += _entry("  timeouts", sorted(definition.timeouts), width)
    lines += _entry("handles", sorted(service.commands), width)
    lines += _entry("subscribes", sorted(service.subscribers), width)
    lines += _entry("listens to", sorted(service.topics), width)
    lines += _entry("store", [redacted(settings.store)], width)
    lines += _entry("bus", [f"{redacted(settings.bus)}  (prefix {settings.prefix})"], width)
    lines += _entry("limits", _limits(settings), width)
    processes = f"{workers} processes" if workers > 1 else "1 process"
    handlers = f"{settings.concurrency} handlers at a time each" if service.commands else ""
    asked = f"health on {health}" if health else "no health port"
    lines += _entry("runs as", [text for text in (processes, handlers, asked) if text], width)
    lines.append("")
    return lines


def _limits(settings: Settings) -> list[str]:
    return [
        f"{settings.batch_max} messages a transaction",
        f"{_bytes(settings.payload_bytes_max)} a message",
        f"{_bytes(settings.state_bytes_max)} an instance",
        f"{settings.attempts_max} attempts",
        f"{settings.shutdown_timeout_s:g} s to stop",
    ]


def _states(definition: Definition) -> list[str]:
    return [f"[{name}]" if state.final else name for name, state in definition.states.items()]


def _entry(label: str, values: Sequence[str], width: int) -> list[str]:
    """``label   value, value`` wrapped under the values; nothing where there are none."""
    if not values:
        return []
    lines: list[str] = []
    line = ""
    for index, value in enumerate(values):
        text = escaped(value, 1000) + ("," if index < len(values) - 1 else "")
        if line and _LABEL + len(line) + 1 + len(text) > width:
            lines.append(line)
            line = text
        else:
            line = f"{line} {text}" if line else text
    lines.append(line)
    first = click.style(f"{label:<{_LABEL}}", fg="cyan") + lines[0]
    return [first, *(" " * _LABEL + line for line in lines[1:])]


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} bytes"
