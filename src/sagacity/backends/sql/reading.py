"""The instances of a batch and what its inbox knows: on PostgreSQL one statement, one trip.

With locks, an instance that another transaction holds is left out and named busy. Without them the
batch is optimistic: what it has read is compared again when it writes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, case, exists, literal_column, null, select, true, union_all

from sagacity.backends.sql.dialects import (
    ONE,
    POSTGRESQL,
    RELEASE,
    ROLL_BACK,
    SAVEPOINT,
    SQLITE,
    Dialect,
    Given,
    Query,
    each,
    lock_timeout,
    matches,
)
from sagacity.backends.sql.errors import translated
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.rows import instance_of
from sagacity.backends.sql.tables import inbox, saga
from sagacity.core.errors import Conflict
from sagacity.core.plan import Loaded

WAIT_MS = 3_000
"""How long a batch waits for instances that others hold, where it waits."""

SagaKey = tuple[str, bytes]
"""Type and key of an instance."""
_KEY = (saga.c.saga_type, saga.c.saga_key)
_FREE, _HELD, _ABSENT, _SEEN = 0, 1, 2, 3
"""What a row tells: an instance, that there is one but held, or none; or an inbox row."""


def _number(value: int) -> ColumnElement[int]:
    return literal_column(str(value))


def read_instances(
    on: Executor,
    keys: Sequence[SagaKey],
    guards: Collection[tuple[str, str]],
    *,
    lock: bool,
    wait: bool = False,
) -> tuple[Loaded, set[tuple[str, str]]]:
    """The instances of sorted keys, and which of `guards`, (consumer, message id), the inbox has.

    Args:
        on: Where to read.
        keys: Instances that are wanted, sorted.
        guards: What to look up in the inbox.
        lock: Locks the instances until the transaction ends. SQLite has one writer and needs none.
        wait: Waits for instances that others hold, a few seconds at most.
    """
    if on.dialect is not POSTGRESQL:
        return _on_sqlite(on, keys), seen(on, guards)
    if not keys:
        return Loaded(instances={}, busy=set()), seen(on, guards)
    if lock and wait:
        _wait_for_locks(on, keys)
    loaded = Loaded(instances={}, busy=set())
    known: set[tuple[str, str]] = set()
    statement, given, asked = _on_postgresql(lock=lock, guarded=bool(guards))
    arguments = given.arguments(keys)
    if asked is not None:
        arguments.update(asked.arguments(encoded(guards)))
    for kind, *row in on.read(statement, arguments):
        if kind == _FREE:
            instance = instance_of(row)
            loaded.instances[instance.type, instance.key] = instance
        elif kind == _SEEN:
            known.add((row[1].decode(), row[2].decode()))
        elif kind == _HELD:
            loaded.busy.add((row[0], row[1].decode()))
    return loaded, known


def seen(on: Executor, guards: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """Which of these (consumer, message id) the inbox has."""
    if not guards:
        return set()
    statement, given = _seen(on.dialect)
    rows = on.read(statement, given.arguments(encoded(guards)))
    return {(row.consumer.decode(), row.message_id.decode()) for row in rows}


def encoded(pairs: Collection[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Pairs of texts as the tables have them."""
    return [(first.encode(), second.encode()) for first, second in pairs]


@cache
def _seen(dialect: Dialect) -> tuple[Query, Given]:
    return dialect.present(inbox.c.consumer, inbox.c.message_id)


# ------------------------------------------------------------------------------------------ SQLite


def _on_sqlite(on: Executor, keys: Sequence[SagaKey]) -> Loaded:
    loaded = Loaded(instances={}, busy=set())
    if keys:
        statement, given = _sqlite_load()
        for row in on.read(statement, given.arguments(keys)):
            instance = instance_of(row)
            loaded.instances[instance.type, instance.key] = instance
    return loaded


@cache
def _sqlite_load() -> tuple[Query, Given]:
    given = SQLITE.given(*_KEY)
    # Whoever may write holds the whole file, so nothing is ever held by others.
    return select(*saga.c).where(given.holds(*_KEY)), given


# -------------------------------------------------------------------------------------- PostgreSQL


@cache
def _on_postgresql(*, lock: bool, guarded: bool) -> tuple[Any, Given, Given | None]:
    """Instances, then inbox rows that are as wide."""
    given = POSTGRESQL.given(*_KEY)
    instances = _locked_by_key(given, wait=False) if lock else _by_key(given)
    if not guarded:
        return instances, given, None
    asked = POSTGRESQL.given(inbox.c.consumer, inbox.c.message_id, name="asked")
    there = exists(
        select(ONE)
        .where(*matches(asked, (inbox.c.consumer, inbox.c.message_id)))
        .correlate(asked.clause)
        .offset(literal_column("0"))
    )
    fill = [null().label(one.name) for one in list(saga.c)[3:]]
    rows = select(
        _number(_SEEN).label("kind"),
        null().label("saga_type"),
        asked.c.consumer.label("saga_key"),
        asked.c.message_id.label("uid"),
        *fill,
    ).where(there)
    return union_all(instances, rows), given, asked


def _by_key(given: Given) -> Query:
    found = each("found", select(*saga.c).where(*matches(given, _KEY)).correlate(given.clause))
    return select(_number(_FREE).label("kind"), *found.c).select_from(
        given.clause.join(found, true())
    )


def _locked_by_key(given: Given, *, wait: bool) -> Query:
    """Locks in the order of the given keys, which everybody sorts.

    Not locked means held or absent; only a look without a lock tells which.
    """
    of_key = select(*saga.c).where(*matches(given, _KEY)).correlate(given.clause)
    locked = each("locked", POSTGRESQL.locked(of_key, saga, wait=wait, weak=True))
    there = exists(of_key.with_only_columns(ONE).offset(literal_column("0")))
    kind = case(
        (locked.c.uid.is_not(None), _number(_FREE)),
        (there, _number(_HELD)),
        else_=_number(_ABSENT),
    ).label("kind")
    rest = list(locked.c)[len(_KEY) :]
    return select(kind, *given.columns, *rest).select_from(given.clause.outerjoin(locked, true()))


@cache
def _waiting_load() -> tuple[Query, Given]:
    given = POSTGRESQL.given(*_KEY)
    return _locked_by_key(given, wait=True), given


def _wait_for_locks(on: Executor, keys: Sequence[SagaKey]) -> None:
    """Waits in key order for each instance and locks it; when that takes too long, for none.

    Rare: for one instance that was busy several times. Nothing else needs savepoints.
    """
    statement, given = _waiting_load()
    on.write(SAVEPOINT)
    try:
        on.write(lock_timeout(WAIT_MS))
        on.read(statement, given.arguments(keys))
    except Exception as error:
        if not isinstance(translated(error, "load"), Conflict):
            raise
        on.write(ROLL_BACK)
        return
    on.write(RELEASE)
