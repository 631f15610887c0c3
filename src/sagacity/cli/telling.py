"""The story of a saga instance as lines for a terminal, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import click
import msgspec

from sagacity.cli.output import age, duration, instant
from sagacity.cli.story import About, Effects, Letter, Step, Story, Undo, Undoing, Waits
from sagacity.core.instance import Status
from sagacity.worker.logs import escaped

__all__ = ["told", "told_why"]

OVERDUE_US: Final = 60_000_000
"""An answer that is out for longer stands out."""
_COLOURS: Final = {
    "stuck": "red",
    "compensating": "yellow",
    "compensated": "yellow",
    "completed": "green",
    "running": "blue",
}


def told(story: Story, *, last: int = 0) -> list[str]:
    """The story as lines; `last` limits the history to its newest steps, 0 does not."""
    now, about = story.now, story.about
    lines = _head(about, now) if about else []
    lines += _why(story)
    if about is not None:
        lines += _section("Data", _data(story.data))
        lines += _section(
            "Found by",
            [
                f"{_text(name)} = {', '.join(_text(value) for value in values)}"
                for name, values in about.keys.items()
            ],
        )
    lines += _section("History, oldest first", _history(story.history, last))
    lines += _section("Dead letters", [_letter(letter, now) for letter in story.dead_letters])
    return lines[:-1]


def told_why(story: Story) -> list[str]:
    """Only why the instance stands where it stands."""
    lines = _why(story)
    lines += _section("Dead letters", [_letter(one, story.now) for one in story.dead_letters])
    return lines[:-1]


def _why(story: Story) -> list[str]:
    colour = _colour(story.about)
    lines = [click.style(_text(story.verdict, 1000), fg=colour, bold=True), ""]
    lines += _section("Waits for", _waits(story.waits, story.now))
    if story.undoing is not None:
        lines += _section("Undo", _undoing(story.undoing))
    return lines


def _colour(about: About | None) -> str:
    return _COLOURS.get(about.status, "yellow") if about else "yellow"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [click.style(title, fg="cyan"), *(f"  {line}" for line in lines), ""]


def _head(about: About, now: int) -> list[str]:
    colour = _colour(about)
    name = click.style(f"{_text(about.type)} {_text(about.key)}", bold=True)
    status = click.style(f"{about.status.upper()} in {_text(about.state)}", fg=colour, bold=True)
    lines = [
        f"{name}  {status}",
        f"  started  {instant(about.started_at)}  {age(about.started_at, now)}",
        f"  moved    {instant(about.updated_at)}  {age(about.updated_at, now)}",
        f"  uid      {_text(about.uid)}, version {about.version}, {about.steps} messages handled",
    ]
    if about.correlation_id:
        lines.append(f"  origin   correlation id {_text(about.correlation_id)}")
    if about.actor:
        lines.append(f"  actor    {_text(about.actor)}")
    return [*lines, ""]


def _waits(waits: Waits, now: int) -> list[str]:
    lines: list[str] = []
    for answer in waits.answers:
        line = (
            f"answer   {_text(answer.type)}  sent {age(answer.sent_at, now)}  "
            f"(id {_text(answer.id)})"
        )
        lines.append(_loud(line) if now - answer.sent_at > OVERDUE_US else line)
    for timeout in waits.timeouts:
        line = f"timeout  {_text(timeout.name)}  {age(timeout.due_at, now)}  ({instant(timeout.due_at)})"
        lines.append(_loud(line) if timeout.due_at < now - 1_000_000 else line)
    lines.extend(f"event    {_text(name)}" for name in waits.events or ())
    lines.extend(
        f"early    {_text(event.type)}  is kept until a state handles it  (id {_text(event.id)})"
        for event in waits.deferred
    )
    for place, message_id in enumerate(waits.parked):
        why = "waits behind it" if place else "failed, is tried again"
        lines.append(_loud(f"parked   message {_text(message_id)}  {why}"))
    return lines


def _undoing(undoing: Undoing) -> list[str]:
    def line(label: str, undo: Undo) -> str:
        text = f"{label:<8} {_text(undo.undo_type)} of {_text(undo.type)}"
        return f"{text}: {_text(undo.error, 1000)}" if undo.error else text

    again = f"  (tried again {undoing.attempt} times)" if undoing.attempt else ""
    lines = [f"because  {_text(undoing.reason, 1000)}{again}"]
    lines.extend(click.style(line("FAILED", undo), fg="red") for undo in undoing.failed)
    lines.extend(line("running", undo) for undo in undoing.under_way)
    lines.extend(line("next", undo) for undo in undoing.remaining)
    lines.extend(
        f"waived   {_text(command_id)}: {_text(reason, 1000)}"
        for command_id, reason in undoing.waived.items()
    )
    return lines


def _data(data: Any) -> list[str]:
    if not isinstance(data, dict) or not data:
        return [_json(data)]
    fields = cast("dict[str, Any]", data)
    width = max(len(name) for name in fields)
    return [f"{_text(name):<{width}}  {_json(value)}" for name, value in fields.items()]


def _history(history: Sequence[Step], last: int) -> list[str]:
    hidden = len(history) - last if last and len(history) > last else 0
    lines = [f"... {hidden} earlier steps; --all shows them"] if hidden else []
    before = 0
    for step in history[hidden:]:
        if before and step.at - before > OVERDUE_US:
            lines.append(click.style(f"    {duration(step.at - before)} later", dim=True))
        before = step.at
        lines.append(_step(step))
        if step.actor:
            lines.append(f"    asked for by {_text(step.actor)}")
        lines.extend(f"    {text}" for text in _effects(step.effects, step.at))
    return lines


def _step(step: Step) -> str:
    if not step.state_from:
        move = f"begins in {_text(step.state_to)}"
    elif step.state_from == step.state_to:
        move = f"stays in {_text(step.state_to)}"
    else:
        move = f"{_text(step.state_from)} -> {_text(step.state_to)}"
    handler = f"  by {_text(step.handler)}" if step.handler else ""
    status = "" if step.status == Status.RUNNING else f"  [{_text(step.status)}]"
    return (
        f"{instant(step.at)}  {_text(step.message_type)}{handler}  "
        f"{click.style(move, bold=True)}{status}"
    )


def _effects(effects: Effects, at: int) -> list[str]:
    verbs = {"undo": "undoes with", "event": "publishes"}
    lines = [
        f"{verbs.get(kind, 'sends')} {_text(name)}  (id {_text(message_id)})"
        for name, message_id, kind in effects.sent
    ]
    lines.extend(
        f"sets timeout {_text(name)}, due {duration(due_at - at)} later"
        for name, due_at in effects.timeouts.items()
    )
    lines.extend(f"cancels timeout {_text(name)}" for name in effects.cancelled)
    lines.extend(f"is found by {_text(name)} = {_text(value)}" for name, value in effects.keys)
    if effects.reason:
        lines.append(f"because {_text(effects.reason, 1000)}")
    return lines


def _letter(letter: Letter, now: int) -> str:
    return (
        f"#{letter.id}  {age(letter.at, now)}  {_text(letter.message_type)}  "
        f"{_text(letter.reason)} after {letter.attempts} attempts: {_text(letter.summary, 300)}"
    )


def _loud(line: str) -> str:
    return click.style(line, fg="yellow")


def _json(value: Any) -> str:
    return _text(msgspec.json.encode(value).decode(), 1000)


def _text(value: str, limit: int = 200) -> str:
    return escaped(value, limit)
