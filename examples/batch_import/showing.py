"""How the command line shows things: tables and short texts, plain where rich is not installed."""

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from examples.batch_import.checking import Verdict
from examples.batch_import.status import BatchReport, Convergence
from sagacity.core.plan import TransitionRow

GOOD, BAD, DIM, WAITS = "green", "bold red", "dim", "yellow"


def plain_table(*headings: str, title: str = "") -> Table:
    """A table without much of a frame."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> RenderableType:
    """Every invariant with what contradicts it."""
    table = plain_table("", "", "invariant")
    for verdict in verdicts:
        mark = Text("holds", GOOD) if verdict.holds else Text("BROKEN", BAD)
        told = Text(verdict.claim)
        for line in verdict.wrong:
            told.append(f"\n- {line}", BAD)
        if verdict.count > len(verdict.wrong):
            told.append(f"\n- and {verdict.count - len(verdict.wrong)} more", BAD)
        table.add_row(Text(verdict.name, "bold"), mark, told)
    return table


def report_table(report: BatchReport) -> RenderableType:
    """What became of the records of a batch."""
    table = plain_table("batch", report.batch_id)
    colour = {"imported": GOOD, "rejected": BAD}.get(report.state, WAITS)
    table.add_row("state", Text(report.state, colour))
    if report.reason:
        table.add_row("because", Text(f"line {report.line}: {report.reason}"))
    table.add_row("source", report.source or "-")
    table.add_row("received", f"{report.received_at:%Y-%m-%d %H:%M:%S}Z")
    end = report.finished_at or datetime.now(UTC)
    taken = (end - report.received_at).total_seconds()
    table.add_row("finished" if report.finished else "so far", f"after {taken:.1f} s")
    if report.state != "rejected":
        table.add_row("chunks", f"{report.chunks_applied} of {report.chunks}")
        table.add_row(
            "records",
            f"{report.records}: {report.applied} applied, {report.stale} stale, "
            f"{report.quarantined} in quarantine",
        )
    for name, count in sorted(report.ignored_fields.items()):
        table.add_row("left as it was", f"{name}, told differently by {count} records")
    for name, count in sorted(report.unknown.items()):
        table.add_row("not understood", f"{name}, {count} times")
    parts: list[RenderableType] = [table]
    if report.errors:
        errors = plain_table("line", "record", "why it is in quarantine")
        for error in report.errors:
            errors.add_row(str(error.line), f"{error.kind} {error.ref}", Text(error.reason))
        more = report.quarantined - len(report.errors)
        if more > 0:
            errors.add_row("", "", f"and {more} more")
        parts += [Text(), errors]
    return Group(*parts)


def convergence_table(found: Convergence) -> RenderableType:
    """Whether all that follows from a batch has ended, and what is open."""
    if found.converged:
        return Text("Converged: nothing that follows from this batch is open.", GOOD)
    table = plain_table("service", "count", "open")
    for one in found.open:
        style = WAITS if one.waits else ""
        note = "" if one.waits else ", under way"
        table.add_row(one.service, str(one.count), Text(one.what + note, style))
    moving = any(not one.waits for one in found.open) or not found.report.finished
    word = "still moving" if moving else "what is open waits for a person or a timeout"
    return Group(Text(f"Not converged yet: {word}.", WAITS), Text(), table)


def story_table(history: Sequence[TransitionRow]) -> RenderableType:
    """What one saga instance went through, with times from its first step."""
    table = plain_table("after", "message", "state", "sends")
    reasons: list[str] = []
    for row in history:
        effects = msgspec.json.decode(row.effects)
        sends = [
            f"{'undo ' if kind == 'undo' else ''}{short(name)}"
            for name, _, kind in effects.get("sent", [])
        ]
        sends += [f"timeout {name}" for name in effects.get("timeouts", {})]
        state = row.state_to
        if row.state_from and row.state_from != row.state_to:
            state = f"{row.state_from} → {row.state_to}"
        if row.status not in {"running", "completed"}:
            state += f" ({row.status})"
        reasons += [effects["reason"]] if effects.get("reason") else []
        table.add_row(
            f"{(row.at - history[0].at) / 1e6:.3f} s",
            short(row.message_type),
            Text(state, BAD if "compens" in state else ""),
            Text(", ".join(sends)),
        )
    because = [Text(f"because {reason}", DIM) for reason in reasons]
    return Group(table, *([Text(), *because] if because else []))


def short(type_name: str) -> str:
    """A message type without its topic."""
    return type_name.rpartition(".")[2]


def console() -> Console:
    """Standard output; without a terminal wide enough for whole lines."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)
