"""`saga`: what an operator types to see how sagas are, and to help them on."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from sagacity.cli import migrating
from sagacity.cli.acting import Order, operator_name, order, preview
from sagacity.cli.banner import package_version
from sagacity.cli.exits import Exit
from sagacity.cli.launching import Launch
from sagacity.cli.load import load_service
from sagacity.cli.options import read_settings, setting_options
from sagacity.cli.output import age, honour_no_color, instant, print_json, print_table
from sagacity.cli.story import Story, letter_of, story
from sagacity.cli.telling import told, told_why
from sagacity.core.decide import Cancel, RetryUndo, WaiveUndo
from sagacity.core.definition import Definition
from sagacity.core.errors import ConfigurationError, DefinitionError, SchemaError, Unavailable
from sagacity.core.instance import Status
from sagacity.ports import DeadLetter
from sagacity.worker import logs
from sagacity.worker.opening import MEMORY, WholeStore, full_store_url, is_new, open_store
from sagacity.worker.redaction import redacted, scrubbed, secrets_of

__all__ = ["main"]

_LETTERS_MAX: Final = 1000
_EPILOG: Final = "The store is named by --store, by SAGACITY_STORE or by SAGACITY_STORE_FILE."

_LIMIT = click.option(
    "--limit", metavar="N", type=click.IntRange(1, 10_000), default=50, help="At most N.  [50]"
)

Question = Callable[[WholeStore], Awaitable[int | None]]


class _Commands(click.Group):
    """Turns errors of the framework into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigurationError, DefinitionError, SchemaError, Unavailable) as error:
            _complain(str(error), ctx)
            sys.exit(int(_status(error)))


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"max_content_width": 100})
@click.version_option(package_version(), prog_name="saga")
def main() -> None:
    """See how sagas are, and help them on."""
    honour_no_color()
    logs.configure(level="warning")


def _answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that every question has."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
    return setting_options(only=["store"])(function)


def _ask(options: dict[str, Any], question: Question) -> None:
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


# ------------------------------------------------------------------------------------------- sagas


@main.command("list")
@click.option("--type", "saga_type", metavar="TYPE", default="", help="Only of this saga.")
@click.option(
    "--status",
    type=click.Choice([str(status) for status in Status]),
    default=None,
    help="Only with this status.",
)
@click.option("--state", metavar="STATE", default="", help="Only in this state.")
@_LIMIT
@click.option("--after", metavar="CURSOR", default="", help="Go on after this line.")
@_answers
def list_(
    saga_type: str,
    status: str | None,
    state: str,
    limit: int,
    after: str,
    as_json: bool,
    **options: Any,
) -> None:
    """List instances, the ones that have not moved for longest first."""

    async def question(store: WholeStore) -> int | None:
        rows = await store.sagas(
            saga_type=saga_type, status=status or "", state=state, limit=limit, after=after
        )
        more = rows[-1].cursor if len(rows) == limit else ""
        now = store.clock.now()
        if as_json:
            print_json({"now": now, "sagas": rows, "next": more})
            return None
        if not rows:
            click.echo("No saga instances.")
            return None
        print_table(
            ["SAGA", "KEY", "STATUS", "STATE", "STARTED", "LAST MOVED"],
            [
                (
                    row.saga_type,
                    row.saga_key,
                    row.status,
                    row.state,
                    instant(row.started_at)[:19],
                    age(row.updated_at, now),
                )
                for row in rows
            ],
        )
        if more:
            click.echo(f"There may be more: --after {shlex.quote(logs.escaped(more, 1000))}")
        return None

    _ask(options, question)


def _instance(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments that name an instance, and the options to know more of its saga."""
    for decorate in (
        _answers,
        click.option(
            "--app-dir", metavar="DIR", default=".", help="Where modules are searched first."
        ),
        click.option(
            "--service",
            "target",
            metavar="MODULE:SERVICE",
            default="",
            help="Also tell which events its state handles.",
        ),
        click.argument("key"),
        click.argument("saga_type", metavar="TYPE"),
    ):
        function = decorate(function)
    return function


@main.command()
@_instance
@click.option("--all", "everything", is_flag=True, help="Show the whole history, not its end.")
def show(everything: bool, **given: Any) -> None:
    """Tell the story of one instance: where it stands, what it waits for, how it got there."""
    _tell(lambda found: told(found, last=0 if everything else 20), **given)


@main.command()
@_instance
def why(**given: Any) -> None:
    """Tell why one instance stands where it stands: what it waits for, and what went wrong."""
    _tell(told_why, **given)


def _tell(
    lines_of: Callable[[Story], list[str]],
    *,
    saga_type: str,
    key: str,
    target: str,
    app_dir: str,
    as_json: bool,
    **options: Any,
) -> None:
    definition = _definition(target, app_dir, saga_type) if target else None

    async def question(store: WholeStore) -> int | None:
        instance = await store.saga(saga_type, key)
        history = await store.history(saga_type, key)
        letters = await _letters_of(store, saga_type, key)
        if instance is None and not history and not letters:
            _nothing_there(saga_type, key)
            return Exit.FAILED
        found = story(instance, history, letters, store.clock.now(), definition)
        if as_json:
            print_json(found)
        else:
            for line in lines_of(found):
                click.echo(line)
        return None

    _ask(options, question)


def _nothing_there(saga_type: str, key: str) -> None:
    click.echo(f"There is no {logs.escaped(saga_type)} {logs.escaped(key)}.", err=True)


async def _letters_of(store: WholeStore, saga_type: str, key: str) -> list[DeadLetter]:
    letters: list[DeadLetter] = []
    for consumer in (saga_type, f"{saga_type}#{key}"):
        found = await store.dead_letters(consumer=consumer, limit=_LETTERS_MAX)
        letters.extend(letter for letter in found if letter.row.saga_key == key)
    return letters


@main.command()
@_answers
def counts(as_json: bool, **options: Any) -> None:
    """Count what matters: instances by status, unpublished messages, timeouts, dead letters.

    Ends with status 1 where an operator is needed: a stuck saga or a dead letter.
    """

    async def question(store: WholeStore) -> int | None:
        found = await store.counts()
        needed = bool(found.get(f"sagas.{Status.STUCK}") or found.get("dead_letters"))
        if as_json:
            print_json(found)
        else:
            print_table(
                ["WHAT", "COUNT"],
                [(name, _figure(name, number)) for name, number in sorted(found.items())],
            )
        return Exit.FAILED if needed else None

    _ask(options, question)


def _figure(name: str, number: int) -> str:
    return f"{number / 1_000_000:.3f} s" if name.endswith("_us") else str(number)


# ------------------------------------------------------------------------------------------- orders


def _order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments and options that every order has."""
    for decorate in (
        _answers,
        click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Only tell what would be done."),
        click.option("--actor", metavar="NAME", default="", help="Who asks for it.  [your login]"),
        click.argument("key"),
        click.argument("saga_type", metavar="TYPE"),
    ):
        function = decorate(function)
    return function


@main.command()
@_order
@click.option("--reason", metavar="TEXT", required=True, help="Why; kept in the history.")
def cancel(reason: str, **given: Any) -> None:
    """End a running instance: what it did is undone, newest first."""
    _give(Cancel(reason), **given)


@main.command()
@_order
@click.option("--reason", metavar="TEXT", default="", help="Why; kept in the history.")
def retry(reason: str, **given: Any) -> None:
    """Have the failed undo commands of a stuck instance sent again."""
    _give(RetryUndo(reason), **given)


@main.command()
@_order
@click.option("--reason", metavar="TEXT", required=True, help="How it was settled; kept.")
def waive(reason: str, **given: Any) -> None:
    """Take the failed undo commands of a stuck instance as settled by hand."""
    _give(WaiveUndo(reason), **given)


def _give(
    message: Order,
    *,
    saga_type: str,
    key: str,
    dry_run: bool,
    yes: bool,
    actor: str,
    as_json: bool,
    **options: Any,
) -> None:
    async def question(store: WholeStore) -> int | None:
        instance = await store.saga(saga_type, key)
        if instance is None:
            _nothing_there(saga_type, key)
            return Exit.FAILED
        effects = preview(instance, message)
        if not as_json:
            name = f"{logs.escaped(saga_type)} {logs.escaped(key)}"
            click.echo(f"{name} is {instance.status} in {logs.escaped(instance.state)}.")
            for line in effects or ["It has done nothing that needs undoing."]:
                click.echo(f"  {logs.escaped(line, 1000)}")
        given = ""
        if not dry_run:
            if not yes and not as_json:
                click.confirm("Go on?", abort=True)
            given = await order(store, instance, message, actor=actor or operator_name())
        if as_json:
            print_json({"effects": effects, "message_id": given})
        elif given:
            click.echo("Asked for. A running worker does it; see `saga show`.")
        return None

    _ask(options, question)


# ------------------------------------------------------------------------------------ dead letters


@main.group("dead-letters", invoke_without_command=True)
@click.pass_context
def dead_letters(ctx: click.Context) -> None:
    """List dead letters, show one, and have them tried again."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(dead_letters_list)


@dead_letters.command("list")
@click.option("--consumer", metavar="NAME", default="", help="Only of this saga or handler.")
@_LIMIT
@_answers
def dead_letters_list(
    consumer: str = "", limit: int = 50, as_json: bool = False, **options: Any
) -> None:
    """List dead letters that were not replayed, newest first."""

    async def question(store: WholeStore) -> int | None:
        letters = await store.dead_letters(consumer=consumer, limit=limit)
        now = store.clock.now()
        if as_json:
            print_json([letter_of(letter) for letter in letters])
            return None
        if not letters:
            click.echo("No dead letters.")
            return None
        print_table(
            ["ID", "WHEN", "FOR", "KEY", "MESSAGE", "WHY", "ATTEMPTS", "ERROR"],
            [
                (
                    str(letter.id),
                    age(letter.row.at, now),
                    letter.row.consumer,
                    letter.row.saga_key,
                    letter.row.message_type,
                    letter.row.reason,
                    str(letter.row.attempts),
                    letter_of(letter).summary[:80],
                )
                for letter in letters
            ],
        )
        return None

    _ask(options, question)


@dead_letters.command("show")
@click.argument("id_", metavar="ID", type=int)
@_answers
def dead_letters_show(id_: int, as_json: bool, **options: Any) -> None:
    """Show one dead letter with its whole error."""

    async def question(store: WholeStore) -> int | None:
        found = await store.dead_letters(limit=_LETTERS_MAX)
        letter = next((letter for letter in found if letter.id == id_), None)
        if letter is None:
            click.echo(f"There is no dead letter {id_} among the newest {_LETTERS_MAX}.", err=True)
            return Exit.FAILED
        facts = letter_of(letter)
        if as_json:
            print_json(facts)
            return None
        for name, value in msgspec.structs.asdict(facts).items():
            if name in {"error", "summary"}:
                continue
            shown = instant(value) if name.endswith("at") and value else value
            click.echo(f"{name:<13} {logs.escaped(str(shown))}")
        for line in facts.error.splitlines():
            click.echo("  " + logs.escaped(line, 2000))
        return None

    _ask(options, question)


@dead_letters.command("replay")
@click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them, or all of --consumer.")
@click.option("--consumer", metavar="NAME", default="", help="With --all: only of this one.")
@click.option("--dry-run", is_flag=True, help="Only tell which ones.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@_answers
def dead_letters_replay(
    ids: tuple[int, ...],
    everything: bool,
    consumer: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Have dead letters tried again, by their consumer, at once."""
    if bool(ids) == everything:
        raise click.UsageError(
            "expected ids of dead letters or --all, got " + _got(ids, everything)
        )

    async def question(store: WholeStore) -> int | None:
        found = await store.dead_letters(consumer=consumer, limit=_LETTERS_MAX)
        chosen = [letter for letter in found if everything or letter.id in ids]
        able = [letter for letter in chosen if letter.row.decoded]
        unknown = sorted(set(ids) - {letter.id for letter in chosen})
        if not as_json:
            for letter in able:
                row = letter.row
                click.echo(
                    f"#{letter.id}  {logs.escaped(row.message_type)} for "
                    f"{logs.escaped(row.consumer)} {logs.escaped(row.saga_key)}"
                )
            for letter in chosen:
                if not letter.row.decoded:
                    click.echo(f"#{letter.id}  could not be decoded, cannot be replayed", err=True)
            for id_ in unknown:
                click.echo(f"#{id_}  is not among the newest {_LETTERS_MAX}", err=True)
        replayed = 0
        if able and not dry_run:
            if not yes and not as_json:
                click.confirm(f"Have {len(able)} tried again?", abort=True)
            replayed = await store.replay([letter.id for letter in able])
        if as_json:
            print_json({"chosen": [letter.id for letter in able], "replayed": replayed})
        else:
            click.echo(f"{replayed} replayed.")
        return Exit.FAILED if unknown or len(able) < len(chosen) else None

    _ask(options, question)


def _got(ids: tuple[int, ...], everything: bool) -> str:
    return "both" if ids and everything else "neither"


# ------------------------------------------------------------------------------------- definitions


@main.command()
@click.argument("target", metavar="MODULE:SERVICE")
@click.argument("saga_type", metavar="[SAGA]", default="")
@click.option("--app-dir", metavar="DIR", default=".", help="Where modules are searched first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diagram(target: str, saga_type: str, app_dir: str, as_json: bool) -> None:
    """Draw the sagas of a service as Mermaid state diagrams."""
    from sagacity.core.diagram import mermaid

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


@main.command()
@click.argument("targets", metavar="MODULE:SERVICE...", nargs=-1, required=True)
@click.option("--app-dir", metavar="DIR", default=".", help="Where modules are searched first.")
@click.option("--check", is_flag=True, help="End with status 1 for a command nobody handles.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def catalog(targets: tuple[str, ...], app_dir: str, check: bool, as_json: bool) -> None:
    """List every message of some services: who makes it, who takes it.

    The same code prints the same lines, so a stored copy shows in review what a change does.
    """
    from sagacity.cli.catalog import catalog as entries_of
    from sagacity.cli.catalog import listed, unhandled

    entries = entries_of([load_service(target, app_dir=app_dir) for target in targets])
    if as_json:
        print_json(entries)
    else:
        for line in listed(entries):
            click.echo(line)
    if check and unhandled(entries):
        sys.exit(int(Exit.FAILED))


def _definition(target: str, app_dir: str, saga_type: str) -> Definition:
    service = load_service(target, app_dir=app_dir)
    return _named(service.sagas, saga_type, service.name)


def _named(sagas: dict[str, Definition], saga_type: str, service: str) -> Definition:
    if saga_type not in sagas:
        known = ", ".join(sorted(sagas)) or "none"
        raise ConfigurationError(
            f"service {service} has no saga {saga_type!r}: expected one of {known}"
        )
    return sagas[saga_type]


# ---------------------------------------------------------------------------------------- the rest


@main.command()
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it.")
@click.option(
    "--dialect",
    type=click.Choice(["sqlite", "postgresql"]),
    default=None,
    help="With --sql: for this database, without connecting to any.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@_answers
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
@click.option("--app-dir", metavar="DIR", default=".", help="Where modules are searched first.")
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
    from sagacity.cli.dev import run

    settings = read_settings(options)
    what = Launch(
        target=target, app_dir=app_dir, factory=factory, reload=not no_reload, migrate=True
    )
    sys.exit(int(run(what, settings, Path(data))))


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
