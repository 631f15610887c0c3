"""`saga dev`: a service with servers of its own, for the first try and for development."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec

from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.cli.exits import Exit
from sagacity.cli.launching import Launch, complain, launch
from sagacity.core.errors import SagacityError
from sagacity.worker.config import Settings

__all__ = ["run"]


def run(what: Launch, settings: Settings, data: Path) -> Exit:
    """Runs the service; whichever of store and bus is left at its default is provided.

    The database and what Redis keeps lie in `data`, so that work goes on where it stopped. Redis
    ends with this process.
    """
    provided: dict[str, str] = {}
    with ExitStack() as servers:
        if settings.store == Settings().store:
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            provided["store"] = f"sqlite+aiosqlite:///{data.absolute() / 'sagacity.db'}"
        if settings.bus == Settings().bus:
            embedded = EmbeddedRedis(data_dir=data / "redis", append_only="everysec")
            try:
                servers.enter_context(embedded)
            except (SagacityError, OSError) as error:
                complain(str(error))
                return Exit.WRONG
            provided["bus"] = embedded.url
        _tell(provided)
        reload = what.reload and importlib.util.find_spec("watchfiles") is not None
        return launch(
            msgspec.structs.replace(what, reload=reload),
            msgspec.structs.replace(settings, **provided),
        )


def _tell(provided: dict[str, str]) -> None:
    """How another terminal, or a program that publishes, reaches the servers that we provide.

    URLs that were named are not repeated: they may hold secrets.
    """
    if provided:
        click.echo(click.style("In another terminal:", fg="cyan"), err=True)
    for name, url in provided.items():
        click.echo(f"  export SAGACITY_{name.upper()}={shlex.quote(url)}", err=True)
    sys.stderr.flush()
