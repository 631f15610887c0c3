"""Participants' work: handing parked messages out under leases, lane by lane, and ending them.

A lane's row is the lock that all workers of the lane go through, so that its tasks run one at a
time and in order, whichever consumers they are for. Locks are taken lanes first, then parked rows,
everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import (
    ColumnElement,
    Update,
    and_,
    bindparam,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    update,
)

from sagacity.backends.sql import outbox
from sagacity.backends.sql.dialects import Dialect, Given, Query
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.plan_writer import write_records
from sagacity.backends.sql.rows import lenient, parked_of
from sagacity.backends.sql.tables import IS_WORK, lane, parked, tombstone
from sagacity.ports import Finish, PendingRow, Task

Key = tuple[bytes, bytes]
"""(consumer, message_id) of a parked row."""

_KEY = (parked.c.consumer, parked.c.message_id)
_NOTHING = literal(b"")


# ------------------------------------------------------------------------------------ what is ready


def _ready() -> ColumnElement[bool]:
    """True for a parked row that may be worked on at ``:now``; see `TaskStore`.

    ``:gap_start`` is the time since which a row must have been parked to go before its number.
    """
    of_lane = lane.c.lane == parked.c.lane
    lease_until = select(lane.c.lease_until).where(of_lane).scalar_subquery()
    next_sequence = select(lane.c.next_sequence).where(of_lane).scalar_subquery()
    earlier = parked.alias("earlier")
    an_earlier_one_waits = exists().where(
        earlier.c.lane == parked.c.lane,
        earlier.c.sequence > 0,
        earlier.c.sequence < parked.c.sequence,
        earlier.c.undoes == _NOTHING,
        earlier.c.reason == literal_column("'work'"),
    )
    its_turn = and_(
        ~an_earlier_one_waits,
        or_(
            parked.c.sequence <= func.coalesce(next_sequence, 1),
            parked.c.parked_at <= bindparam("gap_start"),
        ),
    )
    return and_(
        IS_WORK,
        parked.c.due_at <= bindparam("now"),
        parked.c.lease_until <= bindparam("now"),
        or_(
            parked.c.lane == _NOTHING,
            and_(
                func.coalesce(lease_until, 0) <= bindparam("now"),
                or_(parked.c.undoes != _NOTHING, parked.c.sequence == 0, its_turn),
            ),
        ),
    )


def candidates(
    on: Executor, consumers: Mapping[str, int], now: int, gap_us: int
) -> list[tuple[Key, bytes]]:
    """(key, lane) of rows that look ready, read without locks: one of each lane, oldest first."""
    found: list[tuple[Key, bytes]] = []
    lanes: set[bytes] = set()
    for consumer, most in consumers.items():
        if most <= 0:
            continue
        arguments = {
            "now": now,
            "gap_start": now - gap_us,
            "consumer": consumer.encode(),
            "most": most * 4,
        }
        taken = 0
        for row in on.read(_candidates(), arguments):
            if taken == most:
                break
            if row.lane and row.lane in lanes:
                continue
            lanes.add(row.lane)
            found.append(((row.consumer, row.message_id), row.lane))
            taken += 1
    return found


@cache
def _candidates() -> Query:
    return (
        select(*_KEY, parked.c.lane)
        .where(parked.c.consumer == bindparam("consumer"), _ready())
        # Undo commands first: what they undo need not run at all then.
        .order_by(parked.c.due_at, parked.c.undoes == _NOTHING, parked.c.sequence)
        .limit(bindparam("most"))
    )


# ------------------------------------------------------------------------------------------ leases


def claim(
    on: Executor,
    chosen: Sequence[tuple[Key, bytes]],
    now: int,
    lease_us: int,
    gap_us: int,
) -> list[Task]:
    """Leases those of the candidates that nobody else took in the meantime."""
    dialect = on.dialect
    lanes = sorted({(name,) for _, name in chosen if name})
    free = _lock_free_lanes(on, lanes, now)
    keys = sorted(key for key, name in chosen if not name or name in free)
    if not keys:
        return []
    statement, given = _still_ready(dialect)
    arguments = {**given.arguments(keys), "now": now, "gap_start": now - gap_us}
    rows = on.read(statement, arguments)
    if not rows:
        return []
    token, until = uuid4().hex, now + lease_us
    # A lease that still shows has run out: its holder vanished in the middle of an attempt.
    attempts = [row.attempts + (row.lease_until > 0) for row in rows]
    leased = [
        (row.consumer, row.message_id, token.encode(), until, number)
        for row, number in zip(rows, attempts, strict=True)
    ]
    taken_lanes = sorted({(row.lane,) for row in rows if row.lane})
    if taken_lanes:
        # Their lanes were free, so leases that these rows still show have run out.
        cleared, given = _forget_leases(dialect)
        on.write(cleared, given.arguments(taken_lanes))
        dialect.update(
            on,
            lane,
            ("lane",),
            ("token", "lease_until", "at"),
            [(name, token.encode(), until, now) for (name,) in taken_lanes],
        )
    change = ("token", "lease_until", "attempts")
    dialect.update(on, parked, ("consumer", "message_id"), change, leased)
    undone = _tombstones(on, [row.message_id for row in rows])
    return [
        Task(
            row=msgspec.structs.replace(parked_of(row), attempts=number),
            token=token,
            lease_until=until,
            tombstone=row.message_id in undone,
        )
        for row, number in zip(rows, attempts, strict=True)
    ]


def _lock_free_lanes(on: Executor, lanes: list[tuple[bytes]], now: int) -> set[bytes]:
    dialect = on.dialect
    columns = ("lane", "next_sequence", "token", "lease_until", "at")
    dialect.insert(on, lane, columns, [(name, 1, b"", 0, now) for (name,) in lanes])
    statement, given = _free_lanes(dialect)
    rows = on.read(statement, {**given.arguments(lanes), "now": now})
    return {row.lane for row in rows}


@cache
def _free_lanes(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(lane.c.lane)
    statement = (
        select(lane.c.lane)
        .where(given.holds(lane.c.lane), lane.c.lease_until <= bindparam("now"))
        .order_by(lane.c.lane)
    )
    return dialect.locked(statement, lane, wait=False), given


@cache
def _still_ready(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(*_KEY)
    statement = select(*parked.c).where(given.holds(*_KEY), _ready()).order_by(*_KEY)
    return dialect.locked(statement, parked, wait=False), given


@cache
def _forget_leases(dialect: Dialect) -> tuple[Update, Given]:
    given = dialect.given(parked.c.lane)
    statement = (
        update(parked)
        .where(given.holds(parked.c.lane), parked.c.lease_until > 0)
        .values(token=b"", lease_until=0, attempts=parked.c.attempts + 1)
    )
    return statement, given


def _tombstones(on: Executor, ids: Collection[bytes]) -> set[bytes]:
    statement, given = _buried(on.dialect)
    return {row.command_id for row in on.read(statement, given.arguments([(i,) for i in ids]))}


@cache
def _buried(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(tombstone.c.command_id)
    return select(tombstone.c.command_id).where(given.holds(tombstone.c.command_id)), given


def renew(on: Executor, tasks: Sequence[Task], now: int, lease_us: int) -> list[Task]:
    """Extends the leases that are still ours; see `TaskStore.renew`."""
    dialect, until = on.dialect, now + lease_us
    numbers = _lock_lanes(on, tasks)
    held = _lock_held(on, tasks)
    kept = [task for task in tasks if _key(task) in held]
    keys = sorted(_key(task) for task in kept)
    dialect.update(
        on,
        parked,
        ("consumer", "message_id"),
        ("lease_until",),
        [(*key, until) for key in keys],
    )
    lanes = sorted({task.row.lane.encode() for task in kept} & numbers.keys())
    dialect.update(
        on, lane, ("lane",), ("lease_until", "at"), [(name, until, now) for name in lanes]
    )
    return [
        Task(row=task.row, token=task.token, lease_until=until, tombstone=task.tombstone)
        for task in kept
    ]


def _key(task: Task) -> Key:
    return task.row.consumer.encode(), task.row.message_id.encode()


def _lock_lanes(on: Executor, tasks: Iterable[Task]) -> dict[bytes, int]:
    """Lane -> its next number, locked."""
    names = sorted({(task.row.lane.encode(),) for task in tasks if task.row.lane})
    if not names:
        return {}
    statement, given = _all_lanes(on.dialect)
    rows = on.read(statement, given.arguments(names))
    return {row.lane: row.next_sequence for row in rows}


@cache
def _all_lanes(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(lane.c.lane)
    statement = (
        select(lane.c.lane, lane.c.next_sequence)
        .where(given.holds(lane.c.lane))
        .order_by(lane.c.lane)
    )
    return dialect.locked(statement, lane), given


def _lock_held(on: Executor, tasks: Iterable[Task]) -> set[Key]:
    """Keys of the tasks whose lease is still theirs, locked."""
    asked = sorted((*_key(task), task.token.encode()) for task in tasks)
    if not asked:
        return set()
    statement, given = _held(on.dialect)
    rows = on.read(statement, given.arguments(asked))
    return {(row.consumer, row.message_id) for row in rows}


@cache
def _held(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(*_KEY, parked.c.token)
    statement = select(*_KEY).where(given.holds(*_KEY, parked.c.token)).order_by(*_KEY)
    return dialect.locked(statement, parked), given


# --------------------------------------------------------------------------------------------- end


def end(on: Executor, finishes: Sequence[Finish], now: int) -> tuple[set[Key], list[PendingRow]]:
    """Ends tasks; returns the keys of those whose lease still held, and their outbox rows.

    Nothing is written for a task whose lease was lost.
    """
    dialect = on.dialect
    numbers = _lock_lanes(on, (finish.task for finish in finishes))
    held = _lock_held(on, (finish.task for finish in finishes))
    ours = sorted((f for f in finishes if _key(f.task) in held), key=lambda f: _key(f.task))
    if not ours:
        return held, []
    over = [finish for finish in ours if finish.retry_at is None]
    dialect.delete(on, parked, ("consumer", "message_id"), [_key(f.task) for f in over])
    again = [_tried_again(finish) for finish in ours if finish.retry_at is not None]
    change = ("due_at", "attempts", "error", "token", "lease_until")
    dialect.update(on, parked, ("consumer", "message_id"), change, again)
    buried = sorted(
        {
            (finish.task.row.envelope.undoes.encode(), finish.task.row.consumer.encode(), now)
            for finish in over
            if finish.task.row.envelope.undoes
        }
    )
    dialect.insert(on, tombstone, ("command_id", "consumer", "at"), buried)
    _free_their_lanes(on, ours, numbers, now)
    written = outbox.append_rows(on, [row for f in ours for row in f.outbox], now)
    write_records(on, [f.dead_letter for f in ours if f.dead_letter is not None])
    return held, written


def _tried_again(finish: Finish) -> tuple[Any, ...]:
    row = finish.task.row
    attempts = row.attempts + 1 if finish.counts else row.attempts
    return (
        *_key(finish.task),
        finish.retry_at,
        attempts,
        lenient(finish.error or row.error),
        b"",
        0,
    )


def _free_their_lanes(
    on: Executor, finishes: Sequence[Finish], numbers: dict[bytes, int], now: int
) -> None:
    """Ends the leases of the lanes of `finishes` and counts forward commands that are over.

    `numbers` may name more lanes: those of tasks that were lost are their new holders'.
    """
    ours = {finish.task.row.lane.encode() for finish in finishes}
    after = {name: number for name, number in numbers.items() if name in ours}
    for finish in finishes:
        row, name = finish.task.row, finish.task.row.lane.encode()
        counted = finish.retry_at is None and not row.envelope.undoes
        if counted and name in after:
            after[name] = max(after[name], row.sequence + 1)
    on.dialect.update(
        on,
        lane,
        ("lane",),
        ("next_sequence", "token", "lease_until", "at"),
        [(name, number, b"", 0, now) for name, number in sorted(after.items())],
    )


def next_due(on: Executor, consumers: Collection[str], now: int) -> int | None:
    """When the next row of these consumers will be due; None where none waits for its time."""
    statement, given = _next_due(on.dialect)
    asked = sorted((consumer.encode(),) for consumer in consumers)
    found = on.read(statement, {**given.arguments(asked), "now": now})[0][0]
    return None if found is None else int(found)


@cache
def _next_due(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(parked.c.consumer)
    statement = select(func.min(parked.c.due_at)).where(
        IS_WORK, given.holds(parked.c.consumer), parked.c.due_at > bindparam("now")
    )
    return statement, given
