"""What the operator's commands share: the store they ask, and how errors are told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import click

from sagacity.cli.exits import Exit
from sagacity.cli.options import read_settings, setting_options
from sagacity.core.errors import ConfigurationError, DefinitionError, SchemaError, Unavailable
from sagacity.worker import logs
from sagacity.worker.opening import MEMORY, WholeStore, full_store_url, is_new, open_store
from sagacity.worker.redaction import redacted, scrubbed, secrets_of

__all__ = ["APP_DIR", "JSON", "LIMIT", "Commands", "Question", "answers", "ask"]

LIMIT = click.option(
    "--limit", metavar="N", type=click.IntRange(1, 10_000), default=50, help="At most N.  [50]"
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
APP_DIR = click.option(
    "--app-dir", metavar="DIR", default=".", help="Where modules are searched first."
)

Question = Callable[[WholeStore], Awaitable[int | None]]
"""Asks a store and prints the answer; returns an exit status where that is not 0."""


class Commands(click.Group):
    """Turns errors of the framework into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was named."""
        try:
            return super().invoke(ctx)
        except (ConfigurationError, DefinitionError, SchemaError, Unavailable) as error:
            _complain(str(error), ctx)
            sys.exit(int(_status(error)))


def answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that every question has."""
    return setting_options(only=["store"])(JSON(function))


def ask(options: dict[str, Any], question: Question) -> None:
    """Opens the store of the options, asks, closes; ends the process with the answer's status."""
    settings = read_settings(options)
    click.get_current_context().find_root().obj = secrets_of([settings.store])

    if settings.store != MEMORY and is_new(full_store_url(settings.store)):
        # Connecting would make the file, and then every typing error left one behind.
        raise ConfigurationError(
            f"--store (SAGACITY_STORE): expected an SQLite file that exists, "
            f"got {redacted(settings.store)}"
        )

    async def asked() -> int | None:
        store = open_store(settings.store)
        try:
            await store.prepare()
            return await question(store)
        except Unavailable as error:
            raise Unavailable(f"{redacted(settings.store)} cannot be reached: {error}") from None
        finally:
            await store.close()

    status = asyncio.run(asked())
    if status:
        sys.exit(status)


def _status(error: Exception) -> Exit:
    if isinstance(error, SchemaError):
        return Exit.SCHEMA
    if isinstance(error, Unavailable):
        return Exit.UNREACHABLE
    return Exit.WRONG


def _complain(text: str, ctx: click.Context) -> None:
    secrets: tuple[str, ...] = ctx.find_root().obj or ()
    text = logs.escaped(scrubbed(text, secrets), 2000)
    click.echo(click.style("Error: ", fg="red", bold=True) + text, err=True)
