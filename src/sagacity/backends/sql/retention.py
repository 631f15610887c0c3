"""The janitor's deletions: what is finished and old enough, a few rows at a time."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    bindparam,
    delete,
    exists,
    select,
    tuple_,
)

from sagacity.backends.sql.dialects import Dialect, Query, dialect_of
from sagacity.backends.sql.executors import CoreExecutor
from sagacity.backends.sql.tables import (
    correlation,
    correlation_past,
    dead_letter,
    inbox,
    lane,
    outbox,
    outbox_pending,
    parked,
    saga,
    tombstone,
    transition,
)
from sagacity.core.instance import Status
from sagacity.ports import Retention

FINISHED = tuple(status.value for status in Status if status.finished)

_IS_PENDING = exists().where(outbox_pending.c.seq == outbox.c.seq)
_HAS_WORK = exists().where(parked.c.lane == lane.c.lane)


def clean(connection: Connection, retention: Retention, now: int, limit: int) -> int:
    """Deletes up to `limit` rows of each kind; see `sagacity.ports.RetentionStore`.

    Lanes and tombstones live as long as the inbox: what they guard against is a late copy.
    """
    inbox_end = now - retention.inbox_us
    old: list[tuple[Table, ColumnElement[int], tuple[ColumnElement[bool], ...], int]] = [
        (inbox, inbox.c.at, (), inbox_end),
        (outbox, outbox.c.created_at, (~_IS_PENDING,), now - retention.outbox_us),
        (transition, transition.c.at, (), now - retention.history_us),
        (dead_letter, dead_letter.c.at, (), now - retention.dead_letters_us),
        (tombstone, tombstone.c.at, (), inbox_end),
        (correlation_past, correlation_past.c.at, (), inbox_end),
        (lane, lane.c.at, (~_HAS_WORK, lane.c.lease_until <= now), inbox_end),
    ]
    gone = _finished(connection, now - retention.finished_us, limit)
    for table, at, further, end in old:
        key = tuple(table.primary_key.columns)
        chosen = (
            select(*key)
            .where(at < bindparam("end"), *further)
            .order_by(at)
            .limit(bindparam("most"))
        )
        gone += connection.execute(
            _delete_chosen(dialect_of(connection), table, chosen), {"end": end, "most": limit}
        ).rowcount
    return gone


def _delete_chosen(dialect: Dialect, table: Table, chosen: Query) -> Any:
    # Two janitors, or a janitor and a worker, do not wait for each other.
    free = dialect.locked(chosen, table, wait=False)
    return delete(table).where(_key(table).in_(free))


def _key(table: Table) -> ColumnElement[Any]:
    columns = list(table.primary_key.columns)
    return tuple_(*columns) if len(columns) > 1 else columns[0]


def _finished(connection: Connection, end: int, limit: int) -> int:
    """Deletes finished instances that have not moved since `end`, with their further keys."""
    on = CoreExecutor(connection)
    dialect = on.dialect
    chosen = (
        select(saga.c.saga_type, saga.c.saga_key)
        .where(saga.c.status.in_(FINISHED), saga.c.updated_at < end)
        .limit(limit)
    )
    rows = connection.execute(dialect.locked(chosen, saga, wait=False)).all()
    keys = sorted((row.saga_type, row.saga_key) for row in rows)
    columns = ("saga_type", "saga_key")
    dialect.delete(on, correlation, columns, keys)
    return dialect.delete(on, saga, columns, keys)
