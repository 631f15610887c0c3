"""Outbox rows: written in the caller's transaction, pending until the bus has them.

All functions take an `Executor`, so they serve our own transactions, the user's sessions and anyone
with an open SQLAlchemy Core transaction alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    CTE,
    BindParameter,
    Delete,
    Insert,
    and_,
    any_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    select,
    true,
    union_all,
)

from sagacity.backends.sql.dialects import (
    POSTGRESQL,
    Dialect,
    Given,
    Query,
    each,
    insert_from,
    place_of,
)
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.rows import OUTBOX_COLUMNS, outbox_row, pending_of
from sagacity.backends.sql.tables import outbox, outbox_pending
from sagacity.core.plan import OutboxRow
from sagacity.ports import PendingRow


def append_rows(on: Executor, rows: Sequence[OutboxRow], now: int) -> list[PendingRow]:
    """Writes messages to publish after commit, in order; returns the rows with their numbers.

    A message whose id is in the outbox already is left out: equal ids are the same message. `now`
    is in microseconds since 1970.
    """
    if not rows:
        return []
    first = first_of_each(rows)
    values = [outbox_row(row, now) for row in first.values()]
    if on.dialect is POSTGRESQL:
        statement, given = _postgresql_append()
        fresh = on.read(statement, given.arguments(values))
    else:
        fresh = _sqlite_append(on, values)
    return [
        PendingRow(seq=seq, lane=first[id_].lane, created_at=now, envelope=first[id_].envelope)
        for seq, id_ in fresh
    ]


def first_of_each(rows: Sequence[OutboxRow]) -> dict[bytes, OutboxRow]:
    """Id -> the first row of it; a later copy within one call must not take its place."""
    first: dict[bytes, OutboxRow] = {}
    for row in rows:
        first.setdefault(row.envelope.id.encode(), row)
    return first


@cache
def _postgresql_append() -> tuple[Query, Given]:
    given = POSTGRESQL.given(*(outbox.c[name] for name in OUTBOX_COLUMNS))
    fresh, pending = fresh_rows(given)
    return select(fresh.c.seq, fresh.c.message_id).order_by(fresh.c.seq).add_cte(pending), given


def fresh_rows(given: Given) -> tuple[CTE, CTE]:
    """PostgreSQL: the insert into the outbox, which returns what was not there, and that into pending."""
    fresh = (
        insert_from(given, outbox, OUTBOX_COLUMNS)
        .on_conflict_do_nothing()
        .returning(outbox.c.seq, outbox.c.message_id, outbox.c.lane, outbox.c.created_at)
        .cte("fresh")
    )
    pending = (
        insert(outbox_pending)
        .from_select(
            ["seq", "lane", "created_at"], select(fresh.c.seq, fresh.c.lane, fresh.c.created_at)
        )
        .cte("pending")
    )
    return fresh, pending


def _sqlite_append(on: Executor, values: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
    # Nobody else writes during our transaction, so whatever is above the mark is ours.
    highest, pending, fresh = _sqlite_statements()
    mark = {"mark": on.read(highest)[0][0]}
    on.dialect.insert(on, outbox, OUTBOX_COLUMNS, values)
    on.write(pending, mark)
    return on.read(fresh, mark)


@cache
def _sqlite_statements() -> tuple[Query, Insert, Query]:
    above = outbox.c.seq > bindparam("mark")
    pending = insert(outbox_pending).from_select(
        ["seq", "lane", "created_at"],
        select(outbox.c.seq, outbox.c.lane, outbox.c.created_at).where(above),
    )
    fresh = select(outbox.c.seq, outbox.c.message_id).where(above).order_by(outbox.c.seq)
    return select(func.coalesce(func.max(outbox.c.seq), 0)), pending, fresh


# ----------------------------------------------------------------------------------------- pending

_ROW = (
    outbox_pending.c.seq,
    outbox_pending.c.lane,
    outbox_pending.c.created_at,
    outbox.c.headers,
    outbox.c.body,
)
_JOINED = outbox_pending.join(outbox, outbox.c.seq == outbox_pending.c.seq)


def prefix(
    on: Executor, own: Sequence[PendingRow], forgotten: Collection[int] = ()
) -> list[PendingRow]:
    """All pending rows of the lanes of `own`, and `own` itself, in the order of their numbers.

    A lane's older rows come along because nobody may publish a row before them. Rows `forgotten`
    are left out.
    """
    lanes = sorted({row.lane for row in own if row.lane})
    if not lanes:
        return list(own)
    statement, given, known = _of_lanes(on.dialect)
    left_out = [(row.seq,) for row in own] + [(seq,) for seq in forgotten]
    rows = on.read(
        statement,
        {**given.arguments([(lane.encode(),) for lane in lanes]), **known.arguments(left_out)},
    )
    return in_order([pending_of(row) for row in rows], own)


def in_order(older: Sequence[PendingRow], own: Sequence[PendingRow]) -> list[PendingRow]:
    """All rows in the order of their numbers."""
    return sorted([*older, *own], key=attrgetter("seq"))


@cache
def _of_lanes(dialect: Dialect) -> tuple[Query, Given, Given]:
    lanes = dialect.given(outbox_pending.c.lane, name="lanes")
    known = dialect.given(outbox_pending.c.seq, name="known")
    if dialect is POSTGRESQL:
        return rows_of_lanes(lanes, known), lanes, known
    rows = select(*_ROW).select_from(_JOINED).where(lanes.holds(outbox_pending.c.lane))
    return rows.where(~known.holds(outbox_pending.c.seq)), lanes, known


def rows_of_lanes(lanes: Given, known: Given | None) -> Query:
    """PostgreSQL: the pending rows of lanes, except for those whose numbers are known."""
    seq, lane, created_at = outbox_pending.c
    waiting = select(seq, lane, created_at).where(lane == lanes.c.lane).correlate(lanes.clause)
    if known is not None:
        waiting = waiting.where(~known.holds(seq))
    row = each("waiting", waiting)
    content = each(
        "content",
        select(outbox.c.headers, outbox.c.body).where(outbox.c.seq == row.c.seq).correlate(row),
    )
    joined = lanes.clause.join(row, true()).join(content, true())
    return select(*row.c, *content.c).select_from(joined)


def overdue(on: Executor, older_than: int, limit: int, after: int = 0) -> list[PendingRow]:
    """Whole prefixes of the lanes with a row created at or before `older_than`; see `OutboxStore`."""
    arguments = {"older_than": older_than, "most": limit, "after": after}
    return [pending_of(row) for row in on.read(_overdue(), arguments)]


@cache
def _overdue() -> Query:
    limit: BindParameter[int] = bindparam("most")
    after: BindParameter[int] = bindparam("after")
    old = and_(outbox_pending.c.created_at <= bindparam("older_than"), outbox_pending.c.seq > after)
    lanes = (
        select(outbox_pending.c.lane)
        .where(old)
        .order_by(outbox_pending.c.created_at, outbox_pending.c.seq)
        .limit(limit)
        .subquery("overdue")
    )
    nobody = literal(b"")
    of_lanes = select(outbox_pending.c.seq).where(
        outbox_pending.c.lane != nobody,
        outbox_pending.c.lane.in_(select(lanes.c.lane)),
        outbox_pending.c.seq > after,
    )
    alone = (
        select(outbox_pending.c.seq)
        .where(outbox_pending.c.lane == nobody, old)
        .order_by(outbox_pending.c.seq)
        .limit(limit)
        .subquery("alone")
    )
    chosen = union_all(of_lanes, select(alone.c.seq)).subquery("chosen")
    first = select(chosen.c.seq).order_by(chosen.c.seq).limit(limit)
    return (
        select(*_ROW)
        .select_from(_JOINED)
        .where(outbox_pending.c.seq.in_(first))
        .order_by(outbox_pending.c.seq)
    )


def forget(on: Executor, seqs: Collection[int]) -> None:
    """Deletes pending rows that the bus has; one that is gone, or going, is no error."""
    if not seqs:
        return
    statement, given = _forget(on.dialect)
    on.write(statement, given.arguments([(seq,) for seq in sorted(seqs)]))


@cache
def _forget(dialect: Dialect) -> tuple[Delete, Given]:
    given = dialect.given(outbox_pending.c.seq)
    return forgetting(dialect, given), given


def forgetting(dialect: Dialect, given: Given) -> Delete:
    """The deletion of pending rows. Another worker may forget the same right now: those it leaves."""
    seq = outbox_pending.c.seq
    if dialect is not POSTGRESQL:
        return delete(outbox_pending).where(given.holds(seq))
    # Statistics are mostly made while nothing is pending, and then count one row on many pages. So
    # nothing is left to the planner: as an array, the places are looked up once and not for each row
    # of the table; and only the primary key has them in this order, while to `=` the index by lane
    # seems as good, which must be read as a whole.
    row = (
        select(place_of(outbox_pending).label("at"))
        .where(seq >= given.c.seq, seq <= given.c.seq)
        .order_by(seq)
        .correlate(given.clause)
    )
    found = each("found", POSTGRESQL.locked(row, outbox_pending, wait=False))
    at = select(found.c.at).select_from(given.clause.join(found, true()))
    return delete(outbox_pending).where(
        place_of(outbox_pending) == any_(func.array(at.scalar_subquery()))
    )
