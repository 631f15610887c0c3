"""What operators ask: lists, one instance's story, counts; and the replay of dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    Connection,
    Update,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    union_all,
    update,
)

from sagacity.backends.sql.dialects import Dialect, Given, Query, dialect_of, read
from sagacity.backends.sql.executors import CoreExecutor
from sagacity.backends.sql.marks import mark_pending
from sagacity.backends.sql.outbox import append_rows
from sagacity.backends.sql.rows import (
    PARKED_COLUMNS,
    dead_letter_of,
    instance_of,
    listed,
    parked_row,
    transition_of,
)
from sagacity.backends.sql.tables import (
    dead_letter,
    inbox,
    outbox,
    outbox_pending,
    parked,
    saga,
    timeout,
    transition,
)
from sagacity.core.delivery import decode_entry
from sagacity.core.errors import ConfigurationError
from sagacity.core.instance import Instance, Status
from sagacity.core.plan import OutboxRow, ParkedRow, TransitionRow
from sagacity.ports import DeadLetter, SagaRow


def list_sagas(
    connection: Connection, *, saga_type: str, status: str, state: str, limit: int, after: str
) -> list[SagaRow]:
    """Instances, the ones that have not moved for longest first; see `Inspector.sagas`."""
    conditions = []
    if saga_type:
        conditions.append(saga.c.saga_type == saga_type)
    if state:
        conditions.append(saga.c.state == state)
    if after:
        conditions.append(_beyond(after))
    # One small ordered read for each status uses the index; one over all of them would sort them all.
    rows: list[SagaRow] = []
    for wanted in [status] if status else [one.value for one in Status]:
        statement = (
            select(*(column for column in saga.c if column.name not in {"data", "ledger"}))
            .where(saga.c.status == wanted, *conditions)
            .order_by(saga.c.updated_at, saga.c.saga_type, saga.c.saga_key)
            .limit(limit)
        )
        rows.extend(listed(row) for row in read(connection, statement))
    rows.sort(key=lambda row: (row.updated_at, row.saga_type, row.saga_key.encode()))
    return rows[:limit]


def _beyond(cursor: str) -> Any:
    at, _, place = cursor.partition(" ")
    saga_type, _, key = place.partition(" ")
    if not at.isdecimal() or not key:
        raise ConfigurationError(
            f"list of sagas: expected `after` to be the cursor of a row, got {cursor!r:.80}"
        )
    return or_(
        saga.c.updated_at > int(at),
        and_(
            saga.c.updated_at == int(at),
            or_(
                saga.c.saga_type > saga_type,
                and_(saga.c.saga_type == saga_type, saga.c.saga_key > key.encode()),
            ),
        ),
    )


def one_saga(connection: Connection, saga_type: str, saga_key: str) -> Instance | None:
    """One instance, or None."""
    statement = select(*saga.c).where(
        saga.c.saga_type == saga_type, saga.c.saga_key == saga_key.encode()
    )
    row = connection.execute(statement).one_or_none()
    return None if row is None else instance_of(row)


def history(connection: Connection, saga_type: str, saga_key: str) -> list[TransitionRow]:
    """Transitions of the instance that has the key now, or had it last; oldest first."""
    of_key = (transition.c.saga_type == saga_type, transition.c.saga_key == saga_key.encode())
    uid = connection.execute(
        select(saga.c.uid).where(
            saga.c.saga_type == saga_type, saga.c.saga_key == saga_key.encode()
        )
    ).scalar_one_or_none()
    if uid is None:
        last = select(transition.c.uid).where(*of_key).order_by(transition.c.seq.desc()).limit(1)
        uid = connection.execute(last).scalar_one_or_none()
    statement = (
        select(*transition.c)
        .where(*of_key, transition.c.uid == uid)
        .order_by(transition.c.version, transition.c.seq)
    )
    return [transition_of(row) for row in read(connection, statement)]


# ------------------------------------------------------------------------------------ dead letters


def list_dead_letters(connection: Connection, *, consumer: str, limit: int) -> list[DeadLetter]:
    """Dead letters that were not replayed, newest first."""
    statement = (
        select(*dead_letter.c)
        .where(dead_letter.c.replayed_at.is_(None))
        .order_by(dead_letter.c.at.desc(), dead_letter.c.id.desc())
        .limit(limit)
    )
    if consumer:
        statement = statement.where(dead_letter.c.consumer == consumer.encode())
    return [dead_letter_of(row) for row in read(connection, statement)]


def replay(connection: Connection, ids: Sequence[int], now: int) -> int:
    """Parks dead letters again, due at once; see `Inspector.replay`.

    One that could not be decoded, was replayed before, or is parked already is left out.
    """
    if not ids:
        return 0
    dialect = dialect_of(connection)
    statement, given = _replayable(dialect)
    letters = [
        dead_letter_of(row)
        for row in connection.execute(
            statement, given.arguments([(id_,) for id_ in sorted(set(ids))])
        )
    ]
    if not letters:
        return 0
    unrouted = [letter for letter in letters if letter.row.unrouted]
    rows = sorted(
        (parked_row(_parked_again(letter, now)) for letter in letters if letter not in unrouted),
        key=lambda r: r[:2],
    )
    parked_now = dialect.insert(CoreExecutor(connection), parked, PARKED_COLUMNS, rows)
    _publish_again(connection, unrouted, now)
    marked, given = _mark_replayed(dialect)
    connection.execute(
        marked, {**given.arguments([(letter.id,) for letter in letters]), "now": now}
    )
    return parked_now + len(unrouted)


def _publish_again(connection: Connection, letters: Sequence[DeadLetter], now: int) -> None:
    """Sends messages once more over the bus, and forgets that they were seen."""
    if not letters:
        return
    keys = sorted({(one.row.consumer.encode(), one.row.message_id.encode()) for one in letters})
    on = CoreExecutor(connection)
    on.dialect.delete(on, inbox, ("consumer", "message_id"), keys)
    rows = [OutboxRow("", decode_entry(letter.row.entry)) for letter in letters]
    append_rows(on, rows, now)
    # What came out of this outbox is there, and has left long ago.
    mark_pending(connection, outbox.c.message_id.in_([message_id for _, message_id in keys]))


def _parked_again(letter: DeadLetter, now: int) -> ParkedRow:
    row = letter.row
    return ParkedRow(
        consumer=row.consumer,
        message_id=row.message_id,
        saga_type=row.saga_type,
        saga_key=row.saga_key,
        lane=row.lane,
        sequence=row.sequence,
        due_at=now,
        attempts=0,
        parked_at=now,
        reason="retry" if row.saga_type else "work",
        error=row.error,
        envelope=decode_entry(row.entry),
    )


@cache
def _replayable(dialect: Dialect) -> tuple[Query, Given]:
    given = dialect.given(dead_letter.c.id)
    statement = (
        select(*dead_letter.c)
        .where(
            given.holds(dead_letter.c.id),
            dead_letter.c.replayed_at.is_(None),
            dead_letter.c.decoded,
        )
        .order_by(dead_letter.c.id)
    )
    return dialect.locked(statement, dead_letter), given


@cache
def _mark_replayed(dialect: Dialect) -> tuple[Update, Given]:
    given = dialect.given(dead_letter.c.id)
    statement = (
        update(dead_letter)
        .where(given.holds(dead_letter.c.id))
        .values(replayed_at=bindparam("now"))
    )
    return statement, given


# ------------------------------------------------------------------------------------------ counts


def counts(connection: Connection, now: int) -> dict[str, int]:
    """Rows that matter to an operator; see `Inspector.counts`."""
    found = {f"sagas.{status.value}": 0 for status in Status}
    statement = select(saga.c.status, func.count()).group_by(saga.c.status)
    found.update({f"sagas.{status}": number for status, number in read(connection, statement)})
    single = union_all(
        select(literal("outbox.pending").label("name"), func.count().label("number")).select_from(
            outbox_pending
        ),
        select(literal("timeouts"), func.count()).select_from(timeout),
        select(literal("dead_letters"), func.count())
        .select_from(dead_letter)
        .where(dead_letter.c.replayed_at.is_(None)),
    )
    found.update((name, number) for name, number in read(connection, select(single.subquery())))
    by_consumer = select(parked.c.consumer, func.count()).group_by(parked.c.consumer)
    found["parked"] = 0
    for who, number in read(connection, by_consumer):
        # "type#key" names one of many instances; the figure is for the type.
        name = f"parked.{who.decode().partition('#')[0]}"
        found["parked"] += number
        found[name] = found.get(name, 0) + number
    oldest = connection.execute(select(func.min(outbox_pending.c.created_at))).scalar_one()
    found["outbox.oldest_us"] = max(0, now - oldest) if oldest is not None else 0
    return found
