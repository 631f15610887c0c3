"""The command line of the example: `python -m examples.batch_import`."""

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.text import Text

from examples.batch_import import generate as generating
from examples.batch_import.checking import check_all, held_up
from examples.batch_import.demo import Demo
from examples.batch_import.loading import submit
from examples.batch_import.messages import ConfirmEmail
from examples.batch_import.place import Place
from examples.batch_import.sending import send
from examples.batch_import.servers import Servers
from examples.batch_import.showing import (
    BAD,
    console,
    convergence_table,
    report_table,
    verdict_table,
)
from examples.batch_import.status import convergence, read_report

DIRECTORY: Final = Path(".batch-import")


def _at(function: Any) -> Any:
    return click.option(
        "--at",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        default=DIRECTORY,
        envvar="BATCH_IMPORT_AT",
        show_default=True,
        help="The directory that `run` was given.",
    )(function)


def _place(directory: Path) -> Place:
    try:
        return Place.read(directory)
    except FileNotFoundError:
        raise click.ClickException(
            f"no program was started in {directory}; run `python -m examples.batch_import run` "
            "in another terminal, or name its directory with --at"
        ) from None


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    """Import batches of users and orders, and create the accounts that the orders ask for.

    `demo` shows everything at once and cleans up. `run` starts the program and keeps it running;
    then `load`, `status`, `confirm` and `check` talk to it from other terminals.
    """


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--wait", is_flag=True, help="Return when the batch is imported or rejected.")
@_at
def load(file: Path, wait: bool, directory: Path) -> None:
    """Hand in a batch FILE. It is taken at once; `status` tells what becomes of it."""
    place = _place(directory)
    receipt = asyncio.run(
        submit(file, store=place.stores["importing"], bus=place.bus, prefix=place.prefix)
    )
    click.echo(f"batch {receipt.batch_id} taken (correlation {receipt.command_id})")
    if not wait:
        return
    while True:
        report = asyncio.run(read_report(place.stores["importing"], receipt.batch_id))
        if report is not None and report.finished:
            break
        time.sleep(0.2)
    out = console()
    out.print(report_table(report))
    if report.digest != receipt.digest:
        out.print(
            Text("This file was refused: the batch above came before, with other content.", BAD)
        )
        sys.exit(1)
    sys.exit(0 if report.state == "imported" else 1)


@main.command()
@click.argument("batch")
@_at
def status(batch: str, directory: Path) -> None:
    """Tell what became of BATCH, and what is still open of all that follows from it."""
    found = asyncio.run(convergence(_place(directory).stores, batch))
    if found is None:
        raise click.ClickException(f"no batch {batch!r} was handed in")
    out = console()
    out.print(report_table(found.report))
    out.print()
    out.print(convergence_table(found))


@main.command()
@click.argument("token")
@_at
def confirm(token: str, directory: Path) -> None:
    """Confirm an address by the TOKEN of its mail, as the confirm page does."""
    place = _place(directory)
    command_id = asyncio.run(
        send(
            ConfirmEmail(token.rpartition("/")[2]),
            store=place.stores["authentication"],
            bus=place.bus,
            prefix=place.prefix,
            source="batch-import",
        )
    )
    click.echo(f"confirmation taken (correlation {command_id})")


@main.command()
@_at
def check(directory: Path) -> None:
    """Compare all databases, ledgers and mails; exit with 0 only if every invariant holds."""
    evidence = _place(directory).evidence
    verdicts = asyncio.run(check_all(evidence))
    out = console()
    out.print(verdict_table(verdicts))
    for line in asyncio.run(held_up(evidence)):
        out.print(Text(f"needs a person: {line}", "yellow"))
    sys.exit(0 if all(verdict.holds for verdict in verdicts) else 1)


@main.command()
@click.option("--store", default="", metavar="URL", help="PostgreSQL server; without it SQLite.")
@click.option("--workers", default=1, show_default=True, help="Processes per service.")
@_at
def run(store: str, workers: int, directory: Path) -> None:
    """Start all services, the remote systems and the mail sink, and keep them until Ctrl-C."""
    directory.mkdir(parents=True, exist_ok=True)
    with Servers(directory.absolute(), store=store, workers=workers, keep=True) as servers:
        servers.program.place.write(directory)
        click.echo(f"running in {directory}; mails at {servers.program.mail_url}; Ctrl-C ends")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


@main.command()
@click.option("--store", default="", metavar="URL", help="PostgreSQL server; without it SQLite.")
@click.option("--users", type=click.IntRange(min=8), default=60, show_default=True)
@click.option("--orders", type=click.IntRange(min=20), default=200, show_default=True)
@click.option("--seed", default=7, show_default=True)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep files here.")
def demo(store: str, users: int, orders: int, seed: int, keep: Path | None) -> None:
    """Show everything in under a minute, on servers of its own, and clean up."""
    sys.exit(Demo(store=store, users=users, orders=orders, seed=seed, keep=keep).run())


main.add_command(generating.main, "generate")
