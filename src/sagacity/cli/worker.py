"""`saga-worker`: runs a service."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from sagacity.cli.banner import banner, package_version
from sagacity.cli.child import Orders, Parent
from sagacity.cli.exits import Exit
from sagacity.cli.load import load_service
from sagacity.cli.options import SectionedCommand, read_settings, setting_options
from sagacity.cli.reload import Reloader, check_watcher
from sagacity.cli.serving import Running, serve
from sagacity.cli.stopping import Stopping
from sagacity.cli.supervisor import Supervisor
from sagacity.core.errors import ConfigurationError, DefinitionError
from sagacity.service import Service
from sagacity.worker import logs
from sagacity.worker.config import Settings, unknown_variables
from sagacity.worker.health import WorkerProbe
from sagacity.worker.opening import MEMORY, full_store_url, is_new
from sagacity.worker.redaction import redacted, scrubbed, secrets_of

__all__ = ["main"]

log = logging.getLogger(__name__)

_EPILOG: Final = (
    "Each option can also be set by a variable: SAGACITY_BATCH_MAX for --batch-max. A flag goes"
    " before a variable, a variable before the default. SAGACITY_STORE_FILE and SAGACITY_BUS_FILE"
    " name files that hold the URLs, which keeps passwords out of the process list."
)
OTHER_VARIABLES: Final = (
    "SAGACITY_WORKERS",
    "SAGACITY_APP_DIR",
    "SAGACITY_MIGRATE",
    "SAGACITY_REFUSE_UNSAFE",
)


@click.command(cls=SectionedCommand, epilog=_EPILOG, context_settings={"max_content_width": 100})
@click.argument("service", metavar="MODULE:SERVICE")
@click.option(
    "-w",
    "--workers",
    type=int,
    default=1,
    metavar="N",
    envvar="SAGACITY_WORKERS",
    help="Worker processes; more than one are kept running by a parent.  [1]",
)
@click.option("-r", "--reload", is_flag=True, help="Start anew when a Python file changes.")
@click.option(
    "--app-dir",
    metavar="DIR",
    default=".",
    envvar="SAGACITY_APP_DIR",
    help="Where modules are searched first.  [.]",
)
@click.option("-f", "--factory", is_flag=True, help="SERVICE is a function that returns one.")
@click.option(
    "--migrate",
    is_flag=True,
    envvar="SAGACITY_MIGRATE",
    help="Create or upgrade the tables before starting. A new SQLite file gets them anyway.",
)
@click.option(
    "--refuse-unsafe",
    is_flag=True,
    envvar="SAGACITY_REFUSE_UNSAFE",
    help="Do not start on a bus whose settings may lose messages; otherwise they are logged.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no banner.")
@setting_options()
@click.version_option(package_version(), prog_name="saga-worker")
def main(**options: Any) -> None:
    """Run the service that MODULE:SERVICE names, such as shop.accounts:service.

    SIGTERM or Ctrl-C finishes what has begun and ends; a second one ends at once.
    """
    orders = Parent.orders()
    settings = read_settings(options)
    secrets = secrets_of([settings.store, settings.bus])
    shared = orders is not None or options["workers"] > 1
    logs.configure(form=settings.log_format, level=settings.log_level, secrets=secrets, pid=shared)
    try:
        status = _run(settings, orders, **options)
    except (ConfigurationError, DefinitionError) as error:
        _complain(scrubbed(str(error), secrets))
        status = Exit.WRONG
    sys.exit(int(status))


def _run(
    settings: Settings,
    orders: Orders | None,
    *,
    service: str,
    workers: int,
    reload: bool,
    app_dir: str,
    factory: bool,
    migrate: bool,
    refuse_unsafe: bool,
    quiet: bool,
) -> Exit:

    def load() -> Service:
        return _loaded(service, app_dir, factory)

    if orders is not None:
        return _run_worker(load, settings, orders)
    _check(settings, workers, reload)
    for line in unknown_variables(others=OTHER_VARIABLES):
        _warn(line)
    _warn_of_visible_secrets(settings)
    plan: dict[str, Any] = {
        "create": migrate or is_new(settings.store),
        "refuse_unsafe": refuse_unsafe,
        "banner": not quiet,
        "workers": workers,
        "health": settings.health,
    }
    if not reload and workers == 1:
        return _run_worker(load, settings, Orders(fd=-1, **plan))
    arguments = [service, "--app-dir", app_dir, *(["--factory"] if factory else [])]
    if reload:
        return asyncio.run(_reloading(arguments, settings, app_dir, plan))
    return asyncio.run(_supervised(arguments, settings, workers, plan))


async def _reloading(
    arguments: list[str], settings: Settings, directory: str, plan: dict[str, Any]
) -> Exit:
    return await Reloader(arguments, settings, directory, plan).run()


async def _supervised(
    arguments: list[str], settings: Settings, workers: int, plan: dict[str, Any]
) -> Exit:
    return await Supervisor(arguments, settings, workers, plan).run()


def _run_worker(load: Callable[[], Service], settings: Settings, orders: Orders) -> Exit:
    """One process, with or without a parent."""
    stopping = Stopping(settings.shutdown_timeout_s)
    stopping.install()
    service = load()
    if orders.banner and settings.log_format == "human":
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        health = orders.health or settings.health
        for line in banner(service, settings, workers=orders.workers, health=health, width=width):
            click.echo(line, err=True)
    else:
        log.info("Service starting", extra=_facts(service, settings))
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
            started=attend,
        )
    finally:
        for task in attending:
            task.cancel()
        await asyncio.gather(*attending, return_exceptions=True)


def _facts(service: Service, settings: Settings) -> dict[str, object]:
    """The banner for machines."""
    return {
        "service": service.name,
        "sagas": " ".join(service.sagas),
        "topics": " ".join(sorted(service.topics)),
        "store": redacted(settings.store),
        "bus": redacted(settings.bus),
        "version": package_version(),
    }


def _check(settings: Settings, workers: int, reload: bool) -> None:
    """What can be known to be wrong before anything is started."""
    if workers < 1:
        raise ConfigurationError(f"--workers: expected a number from 1, got {workers}")
    if settings.store != MEMORY:
        full_store_url(settings.store)
    if reload:
        check_watcher()
        if workers > 1:
            raise ConfigurationError(
                f"--reload: expected one worker process, got --workers {workers}; leave one out"
            )
    if workers > 1 and MEMORY in {settings.store, settings.bus}:
        raise ConfigurationError(
            f"--workers {workers}: expected a store and a bus that processes can share, "
            f"got {MEMORY}; name a database and a Redis, or run one worker"
        )


def _loaded(target: str, app_dir: str, factory: bool) -> Service:
    try:
        return load_service(target, app_dir=app_dir, factory=factory)
    except (ConfigurationError, DefinitionError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises
        # Only the frames of the user's code help to find what is wrong in it.
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not _is_machinery(frame.filename)]
        text = "".join(traceback.format_list(theirs))
        text += "".join(traceback.format_exception_only(error))
        raise ConfigurationError(
            f"{target}: the module failed while it was imported\n{text}"
        ) from None


def _is_machinery(filename: str) -> bool:
    return Path(filename).parent == Path(__file__).parent or "importlib" in filename


def _warn_of_visible_secrets(settings: Settings) -> None:
    arguments = " ".join(sys.argv[1:])
    if any(secret in arguments for secret in secrets_of([settings.store, settings.bus])):
        _warn(
            "a password on the command line is visible to every user of this machine; "
            "set SAGACITY_STORE or SAGACITY_BUS instead"
        )


def _complain(text: str) -> None:
    first, _, rest = text.partition("\n")
    click.echo(click.style("Error: ", fg="red", bold=True) + logs.escaped(first, 2000), err=True)
    for line in rest.splitlines():
        click.echo("  " + logs.escaped(line, 2000), err=True)


def _warn(text: str) -> None:
    click.echo(click.style("Warning: ", fg="yellow") + logs.escaped(text, 2000), err=True)
