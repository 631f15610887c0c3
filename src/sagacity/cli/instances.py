"""`saga list`, `show`, `why`, `counts`: how instances are; `cancel`, `retry`, `waive`: orders to them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, Final

import click

from sagacity.cli.acting import Order, operator_name, order, preview
from sagacity.cli.asking import APP_DIR, LIMIT, answers, ask
from sagacity.cli.definitions import definition_of
from sagacity.cli.exits import Exit
from sagacity.cli.output import age, instant, print_json, print_table
from sagacity.cli.story import Story, story
from sagacity.cli.telling import told, told_why
from sagacity.core.decide import Cancel, RetryUndo, WaiveUndo
from sagacity.core.instance import Status
from sagacity.ports import DeadLetter
from sagacity.worker import logs
from sagacity.worker.opening import WholeStore

__all__ = ["cancel", "counts", "list_", "retry", "show", "waive", "why"]

_LETTERS_MAX: Final = 1000


@click.command("list")
@click.option("--type", "saga_type", metavar="TYPE", default="", help="Only of this saga.")
@click.option(
    "--status",
    type=click.Choice([str(status) for status in Status]),
    default=None,
    help="Only with this status.",
)
@click.option("--state", metavar="STATE", default="", help="Only in this state.")
@LIMIT
@click.option("--after", metavar="CURSOR", default="", help="Go on after this line.")
@answers
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

    ask(options, question)


def _instance(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments that name an instance, and the options to know more of its saga."""
    for decorate in (
        answers,
        APP_DIR,
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


@click.command()
@_instance
@click.option("--all", "everything", is_flag=True, help="Show the whole history, not its end.")
def show(everything: bool, **given: Any) -> None:
    """Tell the story of one instance: where it stands, what it waits for, how it got there."""
    _tell(lambda found: told(found, last=0 if everything else 20), **given)


@click.command()
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
    definition = definition_of(target, app_dir, saga_type) if target else None

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

    ask(options, question)


def _nothing_there(saga_type: str, key: str) -> None:
    click.echo(f"There is no {logs.escaped(saga_type)} {logs.escaped(key)}.", err=True)


async def _letters_of(store: WholeStore, saga_type: str, key: str) -> list[DeadLetter]:
    letters: list[DeadLetter] = []
    for consumer in (saga_type, f"{saga_type}#{key}"):
        found = await store.dead_letters(consumer=consumer, limit=_LETTERS_MAX)
        letters.extend(letter for letter in found if letter.row.saga_key == key)
    return letters


@click.command()
@answers
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

    ask(options, question)


def _figure(name: str, number: int) -> str:
    return f"{number / 1_000_000:.3f} s" if name.endswith("_us") else str(number)


# ------------------------------------------------------------------------------------------- orders


def _order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments and options that every order has."""
    for decorate in (
        answers,
        click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Only tell what would be done."),
        click.option("--actor", metavar="NAME", default="", help="Who asks for it.  [your login]"),
        click.argument("key"),
        click.argument("saga_type", metavar="TYPE"),
    ):
        function = decorate(function)
    return function


@click.command()
@_order
@click.option("--reason", metavar="TEXT", required=True, help="Why; kept in the history.")
def cancel(reason: str, **given: Any) -> None:
    """End a running instance: what it did is undone, newest first."""
    _give(Cancel(reason), **given)


@click.command()
@_order
@click.option("--reason", metavar="TEXT", default="", help="Why; kept in the history.")
def retry(reason: str, **given: Any) -> None:
    """Have the failed undo commands of a stuck instance sent again."""
    _give(RetryUndo(reason), **given)


@click.command()
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

    ask(options, question)
