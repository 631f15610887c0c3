"""What a memory store remembers of its bus, and what it sends again when the bus lost something."""

from __future__ import annotations

from collections.abc import Sequence

from sagacity.backends.memory.tables import Tables
from sagacity.core.errors import Conflict
from sagacity.ports import Lost, Mark, Witness


def witness(tables: Tables) -> Witness:
    """The epoch, the identity, and the newest marks; see `MarkStore.witness`."""
    newest: dict[str, Mark] = {}
    for (topic, _), mark in sorted(tables.marks.items()):
        newest[topic] = mark
    settled = min(tables.pending) - 1 if tables.pending else max(tables.outbox, default=0)
    return Witness(epoch=tables.epoch, identity=tables.identity, settled=settled, marks=newest)


def marks_of(tables: Tables, topic: str) -> list[Mark]:
    """The marks of a topic, newest first."""
    found = [mark for mark in tables.marks.values() if mark.topic == topic]
    return sorted(found, key=lambda mark: mark.at, reverse=True)


def record(tables: Tables, marks: Sequence[Mark], dropped: Sequence[Mark]) -> None:
    """Adds marks and forgets others; see `MarkStore.record`."""
    for mark in dropped:
        tables.marks.pop((mark.topic, mark.at), None)
    for mark in marks:
        tables.marks[mark.topic, mark.at] = mark


def republish(
    tables: Tables, lost: Sequence[Lost], *, seen: Witness, epoch: str, identity: str
) -> int:
    """Makes rows pending again; see `MarkStore.republish`."""
    if (tables.epoch, tables.identity) != (seen.epoch, seen.identity):
        raise Conflict(
            "republish: expected the bus that was seen before, got another one; another worker was "
            "first; check again"
        )
    by_topic = {one.topic: one for one in lost}
    again = [
        seq
        for seq, row in tables.outbox.items()
        if (one := by_topic.get(row.envelope.topic, by_topic.get(""))) is not None
        and (seq > one.after or row.created_at >= one.since)
        and seq not in tables.pending
    ]
    tables.mark_pending(again)
    for key, mark in list(tables.marks.items()):
        found = by_topic.get(mark.topic, by_topic.get(""))
        if found is not None and mark.max_seq > found.after:
            del tables.marks[key]
    tables.epoch, tables.identity = epoch, identity
    return len(again)
