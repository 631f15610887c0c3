"""`saga dead-letters`: list them, show one, have them tried again."""

from __future__ import annotations

from typing import Any, Final

import click
import msgspec

from sagacity.cli.asking import LIMIT, answers, ask
from sagacity.cli.exits import Exit
from sagacity.cli.output import age, instant, print_json, print_table
from sagacity.cli.story import letter_of
from sagacity.worker import logs
from sagacity.worker.opening import WholeStore

__all__ = ["dead_letters"]

_LETTERS_MAX: Final = 1000


@click.group("dead-letters", invoke_without_command=True)
@click.pass_context
def dead_letters(ctx: click.Context) -> None:
    """List dead letters, show one, and have them tried again."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(dead_letters_list)


@dead_letters.command("list")
@click.option("--consumer", metavar="NAME", default="", help="Only of this saga or handler.")
@LIMIT
@answers
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

    ask(options, question)


@dead_letters.command("show")
@click.argument("id_", metavar="ID", type=int)
@answers
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

    ask(options, question)


@dead_letters.command("replay")
@click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them, or all of --consumer.")
@click.option("--consumer", metavar="NAME", default="", help="With --all: only of this one.")
@click.option("--dry-run", is_flag=True, help="Only tell which ones.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@answers
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

    ask(options, question)


def _got(ids: tuple[int, ...], everything: bool) -> str:
    return "both" if ids and everything else "neither"
