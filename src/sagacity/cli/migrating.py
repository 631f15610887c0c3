"""`saga migrate`: the tables of a store, brought up to the version of this code."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from sagacity.cli.output import print_json
from sagacity.core.errors import ConfigurationError, Unavailable
from sagacity.worker.opening import MEMORY, full_store_url, is_new
from sagacity.worker.redaction import redacted

__all__ = ["run"]


def run(url: str, *, sql: bool, dialect: str | None, dry_run: bool, as_json: bool) -> None:
    """Upgrades the store at `url`, or prints what would be done.

    With `sql` and a `dialect` nothing is connected. Raises ConfigurationError, SchemaError where the
    tables are newer than this code, and Unavailable.
    """
    from sagacity.backends.sql import migrations
    from sagacity.backends.sql.tables import SCHEMA_VERSION

    if dialect is not None:
        if not sql:
            raise ConfigurationError("--dialect: expected --sql beside it, got --dialect alone")
        click.echo(migrations.sql(dialect), nl=False)
        return
    if url == MEMORY:
        raise ConfigurationError(f"--store: expected a database, got {MEMORY}, which has no tables")
    url = full_store_url(url)
    if sql or dry_run:
        before = 0 if is_new(url) else asyncio.run(_current(url))
        if sql:
            click.echo(migrations.sql(url.partition("+")[0], since=before), nl=False)
            return
        _tell(url, before, SCHEMA_VERSION, done=False, as_json=as_json)
        return
    before, after = asyncio.run(_upgrade(url))
    _tell(url, before, after, done=True, as_json=as_json)


def _tell(url: str, before: int, after: int, *, done: bool, as_json: bool) -> None:
    if as_json:
        facts: dict[str, Any] = {"before": before, "after": after, "done": done}
        print_json(facts)
        return
    shown = redacted(url)
    if before == after:
        click.echo(f"The tables in {shown} have version {after} already.")
    elif before == 0:
        verb = "Created" if done else "Would create"
        click.echo(f"{verb} the tables of version {after} in {shown}.")
    else:
        verb = "Upgraded" if done else "Would upgrade"
        click.echo(f"{verb} the tables in {shown} from version {before} to {after}.")


async def _current(url: str) -> int:
    from sagacity.backends.sql import migrations
    from sagacity.backends.sql.database import Database, open_engine

    database = Database(open_engine(url), None, deadline_s=40.0, owned=True)
    try:
        return await database.read("version", migrations.current)
    except Unavailable as error:
        raise _away(url, error) from None
    finally:
        await database.close()


async def _upgrade(url: str) -> tuple[int, int]:
    from sagacity.backends.sql import migrations
    from sagacity.backends.sql.database import Database, open_engine

    database = Database(open_engine(url), None, deadline_s=600.0, owned=True)
    try:
        return await database.write("migrate", migrations.upgrade)
    except Unavailable as error:
        raise _away(url, error) from None
    finally:
        await database.close()


def _away(url: str, error: Unavailable) -> Unavailable:
    return Unavailable(f"{redacted(url)} cannot be reached: {error}")
