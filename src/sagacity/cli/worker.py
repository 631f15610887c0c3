"""`saga-worker`: runs a service."""

from __future__ import annotations

import sys
from typing import Any, Final

import click

from sagacity.cli.banner import package_version
from sagacity.cli.child import Parent
from sagacity.cli.launching import Launch, launch, warn
from sagacity.cli.options import SectionedCommand, read_settings, setting_options
from sagacity.cli.output import honour_no_color
from sagacity.worker.config import Settings, unknown_variables
from sagacity.worker.redaction import secrets_of

__all__ = ["main"]

_EPILOG: Final = (
    "Each option can also be set by a variable: SAGACITY_BATCH_MAX for --batch-max. A flag goes"
    " before a variable, a variable before the default. SAGACITY_STORE_FILE and SAGACITY_BUS_FILE"
    " name files that hold the URLs, which keeps passwords out of the process list."
)
_OTHER_VARIABLES: Final = (
    "SAGACITY_WORKERS",
    "SAGACITY_APP_DIR",
    "SAGACITY_MIGRATE",
    "SAGACITY_REFUSE_UNSAFE",
)


@click.command(cls=SectionedCommand, epilog=_EPILOG, context_settings={"max_content_width": 100})
@click.argument("target", metavar="MODULE:SERVICE")
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
    honour_no_color()
    settings = read_settings(options)
    orders = Parent.orders()
    if orders is None:
        for line in unknown_variables(others=_OTHER_VARIABLES):
            warn(line)
        _warn_of_visible_secrets(settings)
    sys.exit(int(launch(Launch(**options, orders=orders), settings)))


def _warn_of_visible_secrets(settings: Settings) -> None:
    arguments = " ".join(sys.argv[1:])
    if any(secret in arguments for secret in secrets_of([settings.store, settings.bus])):
        warn(
            "a password on the command line is visible to every user of this machine; "
            "set SAGACITY_STORE or SAGACITY_BUS instead"
        )
