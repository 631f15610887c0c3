"""What every batch writes, as one statement of PostgreSQL: one trip instead of one for each table.

Its parts are data-modifying CTEs. All see the database as it was before the statement; no two parts
write the same row, and none reads what another one wrote, except through what that returns. They run
in the same order whichever of them there are: first those that are counted or answer, then the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Update,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
    union_all,
    update,
)

from sagacity.backends.sql import outbox
from sagacity.backends.sql.dialects import (
    ONE,
    POSTGRESQL,
    Given,
    Query,
    Row,
    given_update,
    insert_from,
    matches,
    place_of,
    places,
    update_from,
)
from sagacity.backends.sql.errors import is_division_by_zero
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.rows import (
    INBOX_COLUMNS,
    OUTBOX_COLUMNS,
    SAGA_CHANGE,
    SAGA_COLUMNS,
    SAGA_MATCH,
    TRANSITION_COLUMNS,
    inbox_row,
    outbox_row,
    pending_of,
    saga_change,
    saga_row,
    transition_row,
)
from sagacity.backends.sql.tables import inbox, outbox_pending, parked, saga, transition
from sagacity.backends.sql.tables import outbox as outbox_table
from sagacity.core.errors import Conflict
from sagacity.core.plan import Plan
from sagacity.ports import PendingRow

SAGAS, MOVES, SAME = "sagas", "moves", "same"
INBOX, OUTBOX, HISTORY = "inbox", "outbox", "history"
FORGOTTEN, LANES, WOKEN = "forgotten", "lanes", "woken"

_COUNTED = {
    MOVES: ("instances at the expected version", "another worker changed them"),
    SAME: ("instances that nobody changed", "another worker changed them"),
}
"""What must be as many as meant. A new instance or message that is not new is an error of its own."""
_APART = (WOKEN, FORGOTTEN, HISTORY, INBOX, SAGAS)
"""Nobody reads from these. PostgreSQL runs such parts from the last to the first: rows are woken when
all that may wait for another worker is written, as where a plan takes several statements."""
_FRESH, _OLDER, _NUMBER = 0, 1, 2
"""What a row of the answer tells: a new outbox row, one that was pending, how many a part wrote."""


def writes_at_once(plan: Plan) -> bool:
    """True for a plan all of which `write_at_once` writes."""
    return not (has_more(plan) or plan.dead_letters)


def write_at_once(
    on: Executor,
    plan: Plan,
    published: Sequence[int],
    unchanged: Sequence[Row] = (),
    *,
    locked: bool = True,
    alone: bool = False,
) -> list[PendingRow]:
    """Writes instances, inbox, outbox and history of a plan, and forgets what was published.

    Returns what to publish; see `sagacity.ports.Transaction.write`. Parked rows are woken here where
    the plan does nothing else, see `has_more`: otherwise its other statements come before that.

    Args:
        on: Where to write.
        plan: What to write.
        published: Numbers of pending rows to forget.
        unchanged: Instances (type, key, version) that must be as they were read, though the plan leaves
            them alone: what was decided rests on them.
        locked: False where the instances were read without locks. Then somebody may change one right
            now; it counts as changed.
        alone: The statement is the whole transaction, and fails by itself where it would write fewer
            rows than meant.

    Raises:
        Conflict: Another worker was faster.
    """
    messages = outbox.first_of_each(plan.outbox)
    new_lanes = {instance.uid for instance in plan.saga_inserts}
    lanes = {row.lane for row in plan.outbox if row.lane} - new_lanes
    woken = [] if has_more(plan) else woken_lanes(plan)
    rows: dict[str, Sequence[Row]] = {
        SAGAS: sorted(saga_row(instance) for instance in plan.saga_inserts),
        MOVES: sorted(saga_change(instance, before) for instance, before in plan.saga_updates),
        SAME: unchanged,
        INBOX: sorted(inbox_row(row, plan.now) for row in plan.inbox),
        OUTBOX: [outbox_row(row, plan.now) for row in messages.values()],
        HISTORY: [transition_row(row) for row in plan.transitions],
        FORGOTTEN: [(seq,) for seq in sorted(set(published))],
        LANES: [(lane.encode(),) for lane in sorted(lanes)],
        WOKEN: woken,
    }
    parts = tuple(name for name, values in rows.items() if values)
    if not parts:
        return []
    statement, given = _statement(parts, free=alone or not locked, alone=alone)
    arguments: dict[str, Any] = {"now": plan.now} if woken else {}
    for name in parts:
        arguments.update(given[name].arguments(rows[name]))
        if alone and name in _COUNTED:
            arguments[f"{name}_meant"] = len(rows[name])
    own: list[PendingRow] = []
    older: list[Any] = []
    try:
        answer = on.read(statement, arguments)
    except Exception as error:
        if alone and is_division_by_zero(error):
            raise Conflict(
                "write: another worker changed or handled some of the batch first; run it again"
            ) from None
        raise
    for row in answer:
        kind, number, name = row[0], row[1], row[2]
        if kind == _FRESH:
            sent = messages[name]
            own.append(PendingRow(number, sent.lane, plan.now, sent.envelope))
        elif kind == _OLDER:
            older.append(row)
        else:
            part = name.decode()
            all_written(number, rows[part], *_COUNTED[part])
    of_own = {row.lane.encode() for row in own}
    return outbox.in_order([pending_of(row[1:]) for row in older if row[2] in of_own], own)


def all_written(written: int, rows: Sequence[Row], what: str, why: str) -> None:
    """Raises Conflict where fewer rows were written than meant."""
    if written != len(rows):
        raise Conflict(
            f"write: expected {len(rows)} {what}, got {written}; {why}; run the batch again"
        )


@cache
def _statement(
    parts: tuple[str, ...], *, free: bool, alone: bool
) -> tuple[Query, Mapping[str, Given]]:
    """The statement for the tables that a plan has rows for, and where their rows go."""
    given = {name: _given(name) for name in parts}
    counted = {name: _written(name, given[name], free=free) for name in parts if name in _COUNTED}
    answers = [
        _answer(_NUMBER, _count(name, alone=alone), f"CAST('{name}' AS BYTEA)").select_from(part)
        for name, part in counted.items()
    ]
    apart: list[CTE] = []
    if OUTBOX in parts:
        fresh, pending = outbox.fresh_rows(given[OUTBOX])
        answers.append(_answer(_FRESH, fresh.c.seq, fresh.c.message_id))
        apart.append(pending)
    if LANES in parts:
        rows = outbox.rows_of_lanes(given[LANES], given.get(FORGOTTEN)).subquery("older")
        kind: ColumnElement[int] = literal_column(str(_OLDER))
        answers.append(select(kind, *rows.c))
    apart.extend(_written(name, given[name], free=free) for name in _APART if name in given)
    whole: Any = union_all(*(answers or [_answer(_FRESH, "0", "CAST('' AS BYTEA)").where(_NEVER)]))
    return whole.add_cte(*apart), given


_NEVER: ColumnElement[bool] = literal_column("FALSE")


def _answer(kind: int, number: Any, name: Any) -> Any:
    """A row as wide as one of a pending message."""
    empty = "CAST('' AS BYTEA)"
    columns: dict[str, Any] = {
        "kind": str(kind),
        "number": number,
        "name": name,
        "at": "0",
        "headers": empty,
        "body": empty,
    }
    made: list[ColumnElement[Any]] = [
        (literal_column(one) if isinstance(one, str) else one).label(label)
        for label, one in columns.items()
    ]
    return select(*made)


def _count(part: str, *, alone: bool) -> ColumnElement[int]:
    """How many rows a part wrote; `alone`, as many as meant, or the statement fails."""
    if not alone:
        return func.count()
    meant = cast(bindparam(f"{part}_meant"), BigInteger)
    zero: ColumnElement[int] = literal_column("0")
    # By zero, which the planner does not see coming. Nothing else in the statement divides.
    return meant.op("/")(case((func.count() == meant, ONE), else_=zero))


def _given(part: str) -> Given:
    if part == MOVES:
        return given_update(part, saga, SAGA_MATCH, SAGA_CHANGE)
    columns = {
        SAGAS: [saga.c[name] for name in SAGA_COLUMNS],
        SAME: [saga.c[name] for name in SAGA_MATCH],
        INBOX: [inbox.c[name] for name in INBOX_COLUMNS],
        OUTBOX: [outbox_table.c[name] for name in OUTBOX_COLUMNS],
        HISTORY: [transition.c[name] for name in TRANSITION_COLUMNS],
        FORGOTTEN: [outbox_pending.c.seq],
        LANES: [outbox_pending.c.lane],
        WOKEN: [parked.c.saga_type, parked.c.lane],
    }
    return POSTGRESQL.given(*columns[part], name=part)


def _written(part: str, given: Given, *, free: bool) -> CTE:
    """The statement of one table."""
    statement: Any
    match part:
        case "sagas":
            statement = insert_from(given, saga, SAGA_COLUMNS)
        case "moves":
            statement = update_from(given, saga, SAGA_MATCH, SAGA_CHANGE, free=free)
        case "same":
            same = [saga.c[name] for name in SAGA_MATCH]
            found = places(given, saga, *matches(given, same), free=True)
            return select(ONE.label("one")).select_from(found).cte(f"write_{part}")
        case "inbox":
            statement = insert_from(given, inbox, INBOX_COLUMNS)
        case "history":
            statement = insert_from(given, transition, TRANSITION_COLUMNS)
        case "forgotten":
            statement = outbox.forgetting(POSTGRESQL, given)
        case _:
            statement = _waking(given)
    if part in _COUNTED:
        statement = statement.returning(ONE.label("one"))
    made: CTE = statement.cte(f"write_{part}")
    return made


# ------------------------------------------------------------------------------------------ waking


def has_more(plan: Plan) -> bool:
    """True where a plan writes to tables that few plans write to."""
    return bool(
        plan.parked
        or plan.unparked
        or plan.released
        or plan.timeouts
        or plan.timeouts_cancelled
        or plan.correlations
        or plan.correlations_dropped
        or plan.correlations_past
    )


def woken_lanes(plan: Plan) -> list[tuple[str, bytes]]:
    """What rows must be parked for to be woken."""
    return sorted({(saga_type, lane.encode()) for saga_type, lane in plan.woken})


def due_at_once(*conditions: ColumnElement[bool]) -> Update:
    """Parked rows that are not due yet, and fulfil conditions, are due now."""
    return update(parked).where(IS_LATER, *conditions).values(due_at=bindparam("now"))


def _waking(given: Given) -> Update:
    """The same for the rows that are parked for something."""
    of_lane = (parked.c.saga_type == given.c.saga_type, parked.c.lane == given.c.lane)
    found = places(given, parked, IS_LATER, *of_lane)
    return due_at_once(place_of(parked) == found.c.at)


IS_LATER = or_(parked.c.due_at.is_(None), parked.c.due_at > bindparam("now"))
