"""`saga diagram` and `saga catalog`: what a service declares, without a store."""

from __future__ import annotations

import sys

import click

from sagacity.cli.asking import APP_DIR, JSON
from sagacity.cli.catalog import catalog as entries_of
from sagacity.cli.catalog import listed, unhandled
from sagacity.cli.exits import Exit
from sagacity.cli.load import load_service
from sagacity.cli.output import print_json
from sagacity.core.definition import Definition
from sagacity.core.diagram import mermaid
from sagacity.core.errors import ConfigurationError

__all__ = ["catalog", "definition_of", "diagram"]


@click.command()
@click.argument("target", metavar="MODULE:SERVICE")
@click.argument("saga_type", metavar="[SAGA]", default="")
@APP_DIR
@JSON
def diagram(target: str, saga_type: str, app_dir: str, as_json: bool) -> None:
    """Draw the sagas of a service as Mermaid state diagrams."""
    service = load_service(target, app_dir=app_dir)
    chosen = (
        [_named(service.sagas, saga_type, service.name)] if saga_type else list(service.definitions)
    )
    texts = {definition.saga_type: mermaid(definition) for definition in chosen}
    if as_json:
        print_json(texts)
        return
    for index, text in enumerate(texts.values()):
        if index:
            click.echo("")
        click.echo(text.rstrip("\n"))


@click.command()
@click.argument("targets", metavar="MODULE:SERVICE...", nargs=-1, required=True)
@APP_DIR
@click.option("--check", is_flag=True, help="End with status 1 for a command nobody handles.")
@JSON
def catalog(targets: tuple[str, ...], app_dir: str, check: bool, as_json: bool) -> None:
    """List every message of some services: who makes it, who takes it.

    The same code prints the same lines, so a stored copy shows in review what a change does.
    """
    entries = entries_of([load_service(target, app_dir=app_dir) for target in targets])
    if as_json:
        print_json(entries)
    else:
        for line in listed(entries):
            click.echo(line)
    if check and unhandled(entries):
        sys.exit(int(Exit.FAILED))


def definition_of(target: str, app_dir: str, saga_type: str) -> Definition:
    """The saga `saga_type` of the service that `target` names; ConfigurationError without one."""
    service = load_service(target, app_dir=app_dir)
    return _named(service.sagas, saga_type, service.name)


def _named(sagas: dict[str, Definition], saga_type: str, service: str) -> Definition:
    if saga_type not in sagas:
        known = ", ".join(sorted(sagas)) or "none"
        raise ConfigurationError(
            f"service {service} has no saga {saga_type!r}: expected one of {known}"
        )
    return sagas[saga_type]
