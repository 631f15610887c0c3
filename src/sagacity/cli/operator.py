"""`saga`: what an operator types to see how sagas are, and to help them on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from sagacity.cli import dev as developing
from sagacity.cli import instances, migrating
from sagacity.cli.asking import APP_DIR, Commands, answers
from sagacity.cli.banner import package_version
from sagacity.cli.dead_letters import dead_letters
from sagacity.cli.definitions import catalog, diagram
from sagacity.cli.launching import Launch
from sagacity.cli.options import read_settings, setting_options
from sagacity.cli.output import honour_no_color
from sagacity.worker import logs
from sagacity.worker.redaction import secrets_of

__all__ = ["main"]

_EPILOG: Final = "The store is named by --store, by SAGACITY_STORE or by SAGACITY_STORE_FILE."


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"max_content_width": 100})
@click.version_option(package_version(), prog_name="saga")
def main() -> None:
    """See how sagas are, and help them on."""
    honour_no_color()
    logs.configure(level="warning")


for command in (
    instances.list_,
    instances.show,
    instances.why,
    instances.counts,
    instances.cancel,
    instances.retry,
    instances.waive,
    dead_letters,
    diagram,
    catalog,
):
    main.add_command(command)


@main.command()
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it.")
@click.option(
    "--dialect",
    type=click.Choice(["sqlite", "postgresql"]),
    default=None,
    help="With --sql: for this database, without connecting to any.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@answers
def migrate(sql: bool, dialect: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Create the tables of a store, or bring them up to the version of this code."""
    settings = read_settings(options)
    click.get_current_context().find_root().obj = secrets_of([settings.store])
    migrating.run(settings.store, sql=sql, dialect=dialect, dry_run=dry_run, as_json=as_json)


@main.command()
@click.argument("target", metavar="MODULE:SERVICE")
@click.option(
    "--data",
    metavar="DIR",
    default=".sagacity",
    help="Where the database and Redis keep their files.  [.sagacity]",
)
@APP_DIR
@click.option("-f", "--factory", is_flag=True, help="SERVICE is a function that returns one.")
@click.option("--no-reload", is_flag=True, help="Do not start anew when a Python file changes.")
@setting_options(only=["store", "bus", "health", "log_level"])
def dev(
    target: str, data: str, app_dir: str, factory: bool, no_reload: bool, **options: Any
) -> None:
    """Run a service with a database and a Redis of its own, for development.

    A real redis-server is started, and ends with this command; the database is an SQLite file. A
    store or a bus that you name is used instead. Files are kept, so work goes on where it stopped.
    """
    settings = read_settings(options)
    what = Launch(
        target=target, app_dir=app_dir, factory=factory, reload=not no_reload, migrate=True
    )
    sys.exit(int(developing.run(what, settings, Path(data))))
