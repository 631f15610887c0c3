"""One saga instance as an operator needs it: where it stands, what it waits for, how it got there.

`story` turns rows into plain values, which is what ``--json`` prints; `sagacity.cli.telling` turns
those into lines. Times are microseconds since 1970 in UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sagacity.cli.output import age, duration
from sagacity.core.definition import Definition
from sagacity.core.delivery import decode_entry
from sagacity.core.errors import DecodeError
from sagacity.core.instance import Instance, Status, Undoable
from sagacity.core.plan import TransitionRow
from sagacity.ports import DeadLetter

__all__ = ["Letter", "Story", "letter_of", "story"]


class About(msgspec.Struct, frozen=True):
    """The instance itself."""

    type: str
    key: str
    uid: str
    status: str
    state: str
    version: int
    schema_version: int
    steps: int
    started_at: int
    updated_at: int
    correlation_id: str
    actor: str
    keys: dict[str, tuple[str, ...]]


class Answer(msgspec.Struct, frozen=True):
    """An answer that has not come."""

    type: str
    id: str
    topic: str
    sent_at: int
    undoes: str


class Timeout(msgspec.Struct, frozen=True):
    """A timeout that is set."""

    name: str
    due_at: int


class Message(msgspec.Struct, frozen=True):
    """A message by type and id."""

    type: str
    id: str


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """What could move the instance, and what is held back."""

    answers: tuple[Answer, ...] = ()
    """Longest outstanding first."""
    timeouts: tuple[Timeout, ...] = ()
    """Next one first."""
    events: tuple[str, ...] | None = None
    """Type names of the events its state handles, where the definition is known."""
    deferred: tuple[Message, ...] = ()
    """Early events, kept until a state handles them."""
    parked: tuple[str, ...] = ()
    """Message ids: the first failed and is tried again, the others wait behind it."""


class Undo(msgspec.Struct, frozen=True):
    """An undo command and what it undoes."""

    undo_type: str
    type: str
    command_id: str
    error: str = ""


class Undoing(msgspec.Struct, frozen=True):
    """A compensation."""

    reason: str
    attempt: int
    remaining: tuple[Undo, ...]
    """Next one first."""
    under_way: tuple[Undo, ...]
    failed: tuple[Undo, ...]
    waived: dict[str, str]


class Effects(msgspec.Struct, frozen=True):
    """What a step did beside changing data."""

    sent: tuple[tuple[str, str, str], ...] = ()
    """(type, id, ``command``, ``event`` or ``undo``)."""
    timeouts: dict[str, int] = {}
    cancelled: tuple[str, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()
    reason: str = ""


class Step(msgspec.Struct, frozen=True):
    """One line of the history."""

    at: int
    version: int
    message_type: str
    message_id: str
    handler: str
    state_from: str
    state_to: str
    status: str
    actor: str
    """Who asked for the message, where that is known."""
    effects: Effects


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter without its body."""

    id: int
    at: int
    consumer: str
    saga_type: str
    saga_key: str
    topic: str
    message_type: str
    message_id: str
    reason: str
    attempts: int
    summary: str
    """Last line of `error`."""
    error: str
    replayable: bool
    replayed_at: int | None


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known of one instance."""

    now: int
    verdict: str
    """What is going on, in one sentence, and what to do where something is wrong."""
    about: About | None
    """None where the instance is gone and only its history is left."""
    waits: Waits
    undoing: Undoing | None
    data: Any
    history: tuple[Step, ...]
    dead_letters: tuple[Letter, ...]


def story(
    instance: Instance | None,
    history: Sequence[TransitionRow],
    letters: Sequence[DeadLetter],
    now: int,
    definition: Definition | None = None,
) -> Story:
    """Puts the rows together. With `definition` the events that its state handles are named."""
    waits = _waits(instance, definition) if instance else Waits()
    undoing = _undoing(instance) if instance else None
    return Story(
        now=now,
        verdict=_verdict(instance, waits, undoing, len(letters), now),
        about=_about(instance) if instance else None,
        waits=waits,
        undoing=undoing,
        data=_data(instance.data) if instance else None,
        history=tuple(_step(row) for row in history),
        dead_letters=tuple(letter_of(letter) for letter in letters),
    )


def letter_of(letter: DeadLetter) -> Letter:
    """What a stored dead letter tells."""
    row = letter.row
    lines = [line for line in row.error.strip().splitlines() if line.strip()]
    return Letter(
        id=letter.id,
        at=row.at,
        consumer=row.consumer,
        saga_type=row.saga_type,
        saga_key=row.saga_key,
        topic=row.topic,
        message_type=row.message_type,
        message_id=row.message_id,
        reason=row.reason,
        attempts=row.attempts,
        summary=lines[-1].strip() if lines else "",
        error=row.error,
        replayable=row.decoded,
        replayed_at=letter.replayed_at,
    )


# --------------------------------------------------------------------------------------- the facts


def _about(instance: Instance) -> About:
    ledger = instance.ledger
    return About(
        type=instance.type,
        key=instance.key,
        uid=instance.uid,
        status=str(instance.status),
        state=instance.state,
        version=instance.version,
        schema_version=instance.schema_version,
        steps=ledger.steps,
        started_at=instance.started_at,
        updated_at=instance.updated_at,
        correlation_id=ledger.correlation_id,
        actor=ledger.actor,
        keys=dict(ledger.keys),
    )


def _waits(instance: Instance, definition: Definition | None) -> Waits:
    ledger = instance.ledger
    answers = [
        Answer(command.type, command.id, command.topic, command.sent_at, command.undoes)
        for command in ledger.pending.values()
    ]
    timeouts = [Timeout(name, armed.due_at) for name, armed in ledger.timeouts.items()]
    events: tuple[str, ...] | None = None
    if definition is not None and instance.status is Status.RUNNING:
        handled = {
            handler.trigger
            for handler in definition.handlers
            if handler.kind == "event" and instance.state in handler.when
        }
        events = tuple(sorted(handled))
    return Waits(
        answers=tuple(sorted(answers, key=lambda answer: answer.sent_at)),
        timeouts=tuple(sorted(timeouts, key=lambda timeout: timeout.due_at)),
        events=events,
        deferred=tuple(Message(event.type, event.id) for event in ledger.deferred),
        parked=tuple(message_id for _, message_id in ledger.parked),
    )


def _undoing(instance: Instance) -> Undoing | None:
    compensation = instance.ledger.compensation
    if compensation is None:
        return None
    errors = compensation.errors
    return Undoing(
        reason=compensation.reason,
        attempt=compensation.attempt,
        remaining=tuple(_undo(entry) for entry in reversed(compensation.remaining)),
        under_way=tuple(_undo(entry) for entry in compensation.under_way.values()),
        failed=tuple(
            _undo(entry, errors.get(undo_id, "")) for undo_id, entry in compensation.failed.items()
        ),
        waived=dict(compensation.waived),
    )


def _undo(entry: Undoable, error: str = "") -> Undo:
    return Undo(entry.undo_type, entry.type, entry.command_id, error)


def _step(row: TransitionRow) -> Step:
    try:
        effects = msgspec.json.decode(row.effects, type=Effects)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        effects = Effects(reason="(the effects of this step cannot be read)")
    return Step(
        at=row.at,
        version=row.version,
        message_type=row.message_type,
        message_id=row.message_id,
        handler=row.handler,
        state_from=row.state_from,
        state_to=row.state_to,
        status=row.status,
        actor=_actor(row.entry),
        effects=effects,
    )


def _actor(entry: bytes) -> str:
    try:
        return decode_entry(entry).actor
    except DecodeError:
        return ""


def _data(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return f"(cannot be read: {data[:100].hex()})"


# ------------------------------------------------------------------------------------- the verdict


def _verdict(
    instance: Instance | None, waits: Waits, undoing: Undoing | None, letters: int, now: int
) -> str:
    if instance is None:
        return "There is no such instance now; this is what was kept."
    idle = duration(now - instance.updated_at)
    reason = undoing.reason if undoing else "no reason was kept"
    match instance.status:
        case Status.COMPLETED:
            return f"Finished in {instance.state}, {idle} ago."
        case Status.COMPENSATED:
            return f"Everything it did was undone, {idle} ago: {reason}"
        case Status.STUCK:
            names = sorted({entry.undo_type for entry in undoing.failed}) if undoing else []
            return (
                f"STUCK for {idle}: {', '.join(names) or 'an undo'} failed for good. Find out why, "
                "then `saga retry` or `saga waive` it."
            )
        case Status.COMPENSATING:
            left = len(undoing.remaining) + len(undoing.under_way) if undoing else 0
            return f"Undoing what it did, {left} to go: {reason}"
        case Status.RUNNING:
            return _verdict_of_running(waits, letters, now, idle)


def _verdict_of_running(waits: Waits, letters: int, now: int, idle: str) -> str:
    parts: list[str] = []
    if waits.parked:
        behind = len(waits.parked) - 1
        parts.append(
            "BLOCKED by a message that failed and is tried again"
            + (f", {behind} more wait behind it" if behind else "")
        )
    if waits.answers:
        count, longest = len(waits.answers), waits.answers[0]
        parts.append(
            f"waits for {count} {'answer' if count == 1 else 'answers'}, longest for "
            f"{longest.type}, sent {age(longest.sent_at, now)}"
        )
    if waits.timeouts:
        parts.append(
            f"timeout {waits.timeouts[0].name} is due {age(waits.timeouts[0].due_at, now)}"
        )
    if letters:
        parts.append(f"{letters} of its messages {'is a' if letters == 1 else 'are'} dead letter")
        parts[-1] += "" if letters == 1 else "s"
    if not parts:
        return f"Idle for {idle}; only an event can move it."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
