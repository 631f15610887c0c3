"""What a store remembers of its bus, and what it sends again when the bus lost something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from sagacity.backends.sql.dialects import POSTGRESQL, dialect_of, read
from sagacity.backends.sql.executors import CoreExecutor
from sagacity.backends.sql.tables import meta, outbox, outbox_pending, publish_mark
from sagacity.core.errors import Conflict
from sagacity.ports import Lost, Mark, Witness

EPOCH_NAME = "bus_epoch"
IDENTITY_NAME = "bus_identity"

MARK_COLUMNS = ("topic", "at", "entry_id", "max_seq")


def witness(connection: Connection) -> Witness:
    """The epoch, the identity, and the newest marks; see `MarkStore.witness`."""
    # In this order: a row written in between is pending, and must not be counted as settled.
    highest = connection.execute(select(func.coalesce(func.max(outbox.c.seq), 0))).scalar_one()
    first_pending = connection.execute(select(func.min(outbox_pending.c.seq))).scalar_one()
    settled = highest if first_pending is None else min(highest, first_pending - 1)
    newest = (
        select(publish_mark.c.topic, func.max(publish_mark.c.at).label("at"))
        .group_by(publish_mark.c.topic)
        .subquery("newest")
    )
    rows = read(
        connection,
        select(*publish_mark.c).join(
            newest,
            (publish_mark.c.topic == newest.c.topic) & (publish_mark.c.at == newest.c.at),
        ),
    )
    bus = _bus(connection)
    return Witness(
        epoch=bus.get(EPOCH_NAME, ""),
        identity=bus.get(IDENTITY_NAME, ""),
        settled=int(settled),
        marks={row.topic: _mark(row) for row in rows},
    )


def marks_of(connection: Connection, topic: str) -> list[Mark]:
    """The marks of a topic, newest first."""
    statement = (
        select(*publish_mark.c)
        .where(publish_mark.c.topic == topic)
        .order_by(publish_mark.c.at.desc())
    )
    return [_mark(row) for row in read(connection, statement)]


def _mark(row: Any) -> Mark:
    return Mark(topic=row.topic, at=row.at, entry_id=row.entry_id.decode(), max_seq=row.max_seq)


def record(connection: Connection, marks: Sequence[Mark], dropped: Sequence[Mark]) -> None:
    """Adds marks and forgets others; see `MarkStore.record`."""
    on = CoreExecutor(connection)
    gone = sorted({(mark.topic, mark.at) for mark in dropped})
    on.dialect.delete(on, publish_mark, ("topic", "at"), gone)
    last = {(mark.topic, mark.at): mark for mark in marks}
    rows = sorted(
        (mark.topic, mark.at, mark.entry_id.encode(), mark.max_seq) for mark in last.values()
    )
    on.dialect.insert(on, publish_mark, MARK_COLUMNS, rows, replace=True)


def republish(
    connection: Connection, lost: Sequence[Lost], *, seen: Witness, epoch: str, identity: str
) -> int:
    """Makes rows pending again and remembers the bus; see `MarkStore.republish`."""
    on = CoreExecutor(connection)
    names = ("name", "value")
    # The two rows are the lock that workers who all see the loss go through; make sure they are there.
    on.dialect.insert(on, meta, names, [(EPOCH_NAME, b""), (IDENTITY_NAME, b"")])
    bus = _bus(connection, lock=True)
    if (bus[EPOCH_NAME], bus[IDENTITY_NAME]) != (seen.epoch, seen.identity):
        raise Conflict(
            "republish: expected the bus that was seen before, got another one; another worker was "
            "first; check again"
        )
    named = [one.topic for one in lost if one.topic]
    count = 0
    for one in lost:
        count += mark_pending(
            connection,
            _concerns(outbox.c.destination, one, named),
            or_(outbox.c.seq > one.after, outbox.c.created_at >= one.since),
        )
        connection.execute(
            delete(publish_mark).where(
                _concerns(publish_mark.c.topic, one, named), publish_mark.c.max_seq > one.after
            )
        )
    remembered = [(EPOCH_NAME, epoch.encode()), (IDENTITY_NAME, identity.encode())]
    on.dialect.insert(on, meta, names, remembered, replace=True)
    return count


def _concerns(topic: ColumnElement[str], one: Lost, named: Sequence[str]) -> ColumnElement[bool]:
    return topic == one.topic if one.topic else topic.not_in(named)


def mark_pending(connection: Connection, *conditions: ColumnElement[bool]) -> int:
    """Makes outbox rows pending; returns how many were not."""
    columns = ["seq", "lane", "created_at"]
    again = select(outbox.c.seq, outbox.c.lane, outbox.c.created_at).where(*conditions)
    make = postgresql.insert if dialect_of(connection) is POSTGRESQL else sqlite.insert
    statement = make(outbox_pending).from_select(columns, again).on_conflict_do_nothing()
    result = connection.execute(statement, execution_options={"preserve_rowcount": True})
    return result.rowcount


def _bus(connection: Connection, *, lock: bool = False) -> dict[str, str]:
    statement = (
        select(meta.c.name, meta.c.value)
        .where(meta.c.name.in_([EPOCH_NAME, IDENTITY_NAME]))
        .order_by(meta.c.name)
    )
    if lock:
        statement = dialect_of(connection).locked(statement, meta)
    return {row.name: row.value.decode() for row in read(connection, statement)}
