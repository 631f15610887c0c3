"""From settings and a service's name to running processes: one, several, or one that reloads."""

from __future__ import annotations

import asyncio
import logging
import shutil
import traceback
from pathlib import Path
from typing import Any

import click
import msgspec

from sagacity.cli.banner import banner, package_version
from sagacity.cli.child import Orders, Parent
from sagacity.cli.exits import Exit
from sagacity.cli.load import load_service
from sagacity.cli.reload import Reloader, check_watcher
from sagacity.cli.serving import Running, serve
from sagacity.cli.stopping import Stopping
from sagacity.cli.supervisor import Supervisor
from sagacity.core.errors import ConfigurationError, DefinitionError
from sagacity.service import Service
from sagacity.worker import logs
from sagacity.worker.config import Settings
from sagacity.worker.health import WorkerProbe
from sagacity.worker.opening import MEMORY, full_store_url, is_new
from sagacity.worker.redaction import redacted, scrubbed, secrets_of

__all__ = ["Launch", "complain", "launch", "warn"]

log = logging.getLogger(__name__)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, beside the settings."""

    target: str
    """``module:attribute`` of the service."""
    app_dir: str = "."
    factory: bool = False
    workers: int = 1
    reload: bool = False
    migrate: bool = False
    refuse_unsafe: bool = False
    quiet: bool = False
    orders: Orders | None = None
    """Set in a process that one of ours started."""

    @property
    def arguments(self) -> list[str]:
        """What a child process is started with; everything else travels in its environment."""
        return [self.target, "--app-dir", self.app_dir, *(["--factory"] if self.factory else [])]

    def load(self) -> Service:
        """The service. Raises ConfigurationError, also for a module that fails, or DefinitionError."""
        try:
            return load_service(self.target, app_dir=self.app_dir, factory=self.factory)
        except (ConfigurationError, DefinitionError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever the user's module raises
            text = _told(error)
            raise ConfigurationError(
                f"{self.target}: the module failed while it was imported\n{text}"
            ) from None


def launch(what: Launch, settings: Settings) -> Exit:
    """Runs until the processes were stopped; returns the exit status and prints what is wrong."""
    secrets = secrets_of([settings.store, settings.bus])
    orders = what.orders
    shared = orders is not None or what.workers > 1
    logs.configure(form=settings.log_format, level=settings.log_level, secrets=secrets, pid=shared)
    try:
        if orders is not None:
            return _run(what, settings, orders)
        _check(what, settings)
        return _launch(what, settings)
    except (ConfigurationError, DefinitionError) as error:
        complain(scrubbed(str(error), secrets))
        return Exit.WRONG


def _check(what: Launch, settings: Settings) -> None:
    """What can be known to be wrong before anything is started."""
    if settings.store != MEMORY:
        full_store_url(settings.store)
    if what.workers < 1:
        raise ConfigurationError(f"--workers: expected a number from 1, got {what.workers}")
    if what.reload:
        check_watcher()
        if what.workers > 1:
            raise ConfigurationError(
                f"--reload: expected one worker process, got --workers {what.workers}; "
                "leave one out"
            )
    if what.workers > 1 and MEMORY in {settings.store, settings.bus}:
        raise ConfigurationError(
            f"--workers {what.workers}: expected a store and a bus that processes can share, "
            f"got {MEMORY}; name a database and a Redis, or run one worker"
        )


def _launch(what: Launch, settings: Settings) -> Exit:
    plan: dict[str, Any] = {
        "create": what.migrate or is_new(settings.store),
        "refuse_unsafe": what.refuse_unsafe,
        "banner": not what.quiet,
        "workers": what.workers,
        "health": settings.health,
    }
    if what.reload:
        return asyncio.run(_reloading(what, settings, plan))
    if what.workers > 1:
        return asyncio.run(_supervised(what, settings, plan))
    return _run(what, settings, Orders(fd=-1, **plan))


async def _reloading(what: Launch, settings: Settings, plan: dict[str, Any]) -> Exit:
    return await Reloader(what.arguments, settings, what.app_dir, plan).run()


async def _supervised(what: Launch, settings: Settings, plan: dict[str, Any]) -> Exit:
    return await Supervisor(what.arguments, settings, what.workers, plan).run()


# --------------------------------------------------------------------------------------- one process


def _run(what: Launch, settings: Settings, orders: Orders) -> Exit:
    """This process works, with or without a parent."""
    stopping = Stopping(settings.shutdown_timeout_s)
    stopping.install()
    service = what.load()
    if orders.banner and settings.log_format == "human":
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        health = orders.health or settings.health
        for line in banner(service, settings, workers=orders.workers, health=health, width=width):
            click.echo(line, err=True)
    else:
        log.info(
            "Service starting",
            extra={
                "service": service.name,
                "sagas": " ".join(service.sagas),
                "topics": " ".join(sorted(service.topics)),
                "store": redacted(settings.store),
                "bus": redacted(settings.bus),
                "version": package_version(),
            },
        )
    return asyncio.run(_serving(service, settings, orders, stopping))


async def _serving(
    service: Service, settings: Settings, orders: Orders, stopping: Stopping
) -> Exit:
    attending: list[asyncio.Task[None]] = []

    def attend(worker: Running) -> None:
        if orders.fd >= 0:
            parent = Parent(orders)
            attending.append(asyncio.create_task(parent.attend(WorkerProbe(worker), stopping)))

    try:
        return await serve(
            service,
            settings,
            stopping,
            create=orders.create,
            refuse_unsafe=orders.refuse_unsafe,
            tell_unsafe=orders.first,
            started=attend,
        )
    finally:
        for task in attending:
            task.cancel()
        await asyncio.gather(*attending, return_exceptions=True)


# -------------------------------------------------------------------------------------------- words


def complain(text: str) -> None:
    """Prints an error in red, escaped; further lines below it."""
    first, _, rest = text.partition("\n")
    click.echo(click.style("Error: ", fg="red", bold=True) + logs.escaped(first, 2000), err=True)
    for line in rest.splitlines():
        click.echo("  " + logs.escaped(line, 2000), err=True)


def warn(text: str) -> None:
    """Prints a warning in yellow, escaped."""
    click.echo(click.style("Warning: ", fg="yellow") + logs.escaped(text, 2000), err=True)


def _told(error: Exception) -> str:
    """A traceback of the user's code only: the frames that help to find what is wrong in it."""
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).parent
    theirs = [
        f for f in frames if Path(f.filename).parent != here and "importlib" not in f.filename
    ]
    return "".join([*traceback.format_list(theirs), *traceback.format_exception_only(error)])
