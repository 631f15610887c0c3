"""A plan as a fixed number of statements, whatever its size.

Tables are written in one order and rows in the order of their keys, so two batches that meet wait
for each other and never in a circle. The number of rows written is compared with the number meant:
the difference is how a lost race shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

from sqlalchemy import Update, select

from sagacity.backends.sql import outbox
from sagacity.backends.sql.dialects import POSTGRESQL, Dialect, Given, Query, Row
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.merged import (
    all_written,
    due_at_once,
    has_more,
    woken_lanes,
    write_at_once,
)
from sagacity.backends.sql.rows import (
    CORRELATION_COLUMNS,
    DEAD_LETTER_COLUMNS,
    INBOX_COLUMNS,
    PARKED_COLUMNS,
    SAGA_CHANGE,
    SAGA_COLUMNS,
    SAGA_MATCH,
    TIMEOUT_COLUMNS,
    TRANSITION_COLUMNS,
    correlation_row,
    dead_letter_row,
    inbox_row,
    parked_row,
    saga_change,
    saga_row,
    timeout_row,
    transition_row,
)
from sagacity.backends.sql.tables import (
    correlation,
    correlation_past,
    dead_letter,
    inbox,
    parked,
    saga,
    timeout,
    transition,
)
from sagacity.core.errors import KeyTaken
from sagacity.core.plan import (
    CorrelationRow,
    DeadLetterRow,
    Plan,
    TransitionRow,
)
from sagacity.ports import PendingRow


def write_plan(
    on: Executor,
    plan: Plan,
    published: Sequence[int],
    unchanged: Sequence[Row] = (),
    armed: Collection[tuple[str, str, int]] = (),
    *,
    locked: bool = True,
) -> list[PendingRow]:
    """Writes a plan in the order of its lists; see `sagacity.ports.Transaction.write`.

    For `unchanged` and `locked` see `write_at_once`. `armed` are timeouts (uid, name, generation) that
    were read without locks: those that the plan cancels must still be there.
    """
    if on.dialect is POSTGRESQL:
        pending = write_at_once(on, plan, published, unchanged, locked=locked)
        if has_more(plan):
            on.plan_anew()
            _write_correlations(on, plan)
            _write_timeouts(on, plan, armed)
            _write_parked(on, plan)
        write_records(on, plan.dead_letters)
        return pending
    _write_sagas(on, plan)
    _check_unchanged(on, unchanged)
    _write_inbox(on, plan)
    _write_correlations(on, plan)
    own = outbox.append_rows(on, plan.outbox, plan.now)
    _write_timeouts(on, plan, armed)
    _write_parked(on, plan)
    write_records(on, plan.dead_letters, plan.transitions)
    outbox.forget(on, published)
    return outbox.prefix(on, own, published)


def _write_sagas(on: Executor, plan: Plan) -> None:
    dialect = on.dialect
    rows = sorted(saga_row(instance) for instance in plan.saga_inserts)
    written = dialect.insert(on, saga, SAGA_COLUMNS, rows)
    all_written(written, rows, "new instances", "another worker started them first")
    rows = sorted(saga_change(instance, before) for instance, before in plan.saga_updates)
    written = dialect.update(on, saga, SAGA_MATCH, SAGA_CHANGE, rows)
    all_written(written, rows, "instances at the expected version", "another worker changed them")


def _check_unchanged(on: Executor, unchanged: Sequence[Row]) -> None:
    if unchanged:
        statement, given = on.dialect.present(*(saga.c[name] for name in SAGA_MATCH))
        there = len(on.read(statement, given.arguments(unchanged)))
        all_written(
            there, unchanged, "instances that nobody changed", "another worker changed them"
        )


def _write_inbox(on: Executor, plan: Plan) -> None:
    rows = sorted(inbox_row(row, plan.now) for row in plan.inbox)
    written = on.dialect.insert(on, inbox, INBOX_COLUMNS, rows)
    all_written(written, rows, "unseen messages", "another worker handled them")


# ------------------------------------------------------------------------------------ correlations


def _write_correlations(on: Executor, plan: Plan) -> None:
    dialect = on.dialect
    dropped = sorted({(kind, key.encode()) for kind, key in plan.correlations_dropped})
    dialect.delete(on, correlation, ("saga_type", "saga_key"), dropped)
    rows = sorted({correlation_row(row) for row in plan.correlations})
    written = dialect.insert(on, correlation, CORRELATION_COLUMNS, rows)
    if written != len(rows):
        # Something was there: harmless, unless it is a unique value of somebody else.
        _check_owners(on, [row for row in plan.correlations if row.unique])
    past = sorted(
        {(kind, name, value.encode(), plan.now) for kind, name, value in plan.correlations_past}
    )
    columns = ("saga_type", "name", "value", "at")
    dialect.insert(on, correlation_past, columns, past, replace=True)


def _check_owners(on: Executor, rows: Collection[CorrelationRow]) -> None:
    if not rows:
        return
    statement, given = _owners(on.dialect)
    asked = [(row.saga_type, row.name, row.value.encode()) for row in rows]
    owners = {
        (found.saga_type, found.name, found.value.decode()): found.saga_key.decode()
        for found in on.read(statement, given.arguments(asked))
    }
    for row in rows:
        owner = owners.get((row.saga_type, row.name, row.value), row.saga_key)
        if owner != row.saga_key:
            raise KeyTaken(row.saga_type, row.name, row.value, owner)


@cache
def _owners(dialect: Dialect) -> tuple[Query, Given]:
    key = (correlation.c.saga_type, correlation.c.name, correlation.c.value)
    given = dialect.given(*key)
    statement = select(*key, correlation.c.saga_key).where(
        given.holds(*key), correlation.c.is_unique
    )
    return statement, given


# ------------------------------------------------------------------------------ timeouts and parked


def _write_timeouts(on: Executor, plan: Plan, armed: Collection[tuple[str, str, int]] = ()) -> None:
    dialect = on.dialect
    cancelled = {(uid.encode(), name.encode()) for uid, name in plan.timeouts_cancelled}
    # The row is all that guards a timeout which changes no instance, such as one whose handler failed.
    taken = {(uid.encode(), name.encode(), number) for uid, name, number in armed}
    rows = sorted(row for row in taken if row[:2] in cancelled)
    written = dialect.delete(on, timeout, ("uid", "name", "generation"), rows)
    all_written(written, rows, "armed timeouts", "another worker took them over")
    keys = sorted(cancelled - {row[:2] for row in rows})
    dialect.delete(on, timeout, ("uid", "name"), keys)
    last = {(row.uid, row.name): row for row in plan.timeouts}
    dialect.insert(
        on,
        timeout,
        TIMEOUT_COLUMNS,
        sorted(timeout_row(row) for row in last.values()),
        replace=True,
    )


def _write_parked(on: Executor, plan: Plan) -> None:
    dialect = on.dialect
    keys = sorted({(who.encode(), id_.encode()) for who, id_ in plan.unparked})
    written = dialect.delete(on, parked, ("consumer", "message_id"), keys)
    all_written(written, keys, "parked messages", "another worker took them over")
    rows = sorted((parked_row(row) for row in plan.parked), key=lambda row: row[:2])
    written = dialect.insert(on, parked, PARKED_COLUMNS, rows)
    all_written(written, rows, "messages that are not parked yet", "another worker parked them")
    if plan.released:
        statement, given = _released(dialect)
        keys = sorted({(who.encode(), id_.encode()) for who, id_ in plan.released})
        on.write(statement, {**given.arguments(keys), "now": plan.now})
    if plan.woken:
        waked, given = _woken(dialect)
        on.write(waked, {**given.arguments(woken_lanes(plan)), "now": plan.now})


@cache
def _released(dialect: Dialect) -> tuple[Update, Given]:
    key = (parked.c.consumer, parked.c.message_id)
    given = dialect.given(*key)
    return due_at_once(given.holds(*key)), given


@cache
def _woken(dialect: Dialect) -> tuple[Update, Given]:
    given = dialect.given(parked.c.saga_type, parked.c.lane)
    return due_at_once(given.holds(parked.c.saga_type, parked.c.lane)), given


# ----------------------------------------------------------------------------------------- records


def write_records(
    on: Executor,
    dead_letters: Sequence[DeadLetterRow],
    transitions: Sequence[TransitionRow] = (),
) -> None:
    """Writes dead letters and history, which nothing can be in conflict with."""
    dialect = on.dialect
    letters = [dead_letter_row(row) for row in dead_letters]
    dialect.insert(on, dead_letter, DEAD_LETTER_COLUMNS, letters)
    lines = [transition_row(row) for row in transitions]
    dialect.insert(on, transition, TRANSITION_COLUMNS, lines)
