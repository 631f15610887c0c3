"""The one transaction of a batch: load under locks, read the guards, write the plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import select

from sagacity.backends.sql.database import OpenTransaction
from sagacity.backends.sql.dialects import (
    RELEASE,
    ROLL_BACK,
    SAVEPOINT,
    Dialect,
    Given,
    Query,
    lock_timeout,
)
from sagacity.backends.sql.errors import translated
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.plan_writer import write_plan
from sagacity.backends.sql.rows import instance_of
from sagacity.backends.sql.tables import (
    correlation,
    correlation_past,
    inbox,
    parked,
    saga,
    timeout,
)
from sagacity.core.errors import Conflict
from sagacity.core.plan import Known, Loaded, Plan
from sagacity.ports import Lookup, PendingRow

WAIT_MS = 3_000
"""How long `load` with `wait` waits for instances that others hold."""

Pairs = Collection[tuple[str, str]]


class SqlTransaction:
    """`sagacity.ports.Transaction` on an open connection."""

    def __init__(self, opened: OpenTransaction) -> None:
        self._opened = opened

    @property
    def now(self) -> int:
        """The store's time at the begin of the transaction."""
        return self._opened.now

    async def correlated(self, lookups: Collection[Lookup]) -> Mapping[Lookup, tuple[str, ...]]:
        """Keys of the instances that have each value; see `Transaction`."""
        if not lookups:
            return {}
        return await self._opened.run("correlation look-up", lambda c: _correlated(c, lookups))

    async def load(self, wanted: Mapping[str, Collection[str]], *, wait: bool = False) -> Loaded:
        """Locks and loads the instances that are free; see `Transaction`."""
        pairs = sorted(
            (saga_type, key.encode()) for saga_type, keys in wanted.items() for key in set(keys)
        )
        if not pairs:
            return Loaded(instances={}, busy=set())
        return await self._opened.run("load", lambda c: _load(c, pairs, wait=wait))

    async def known(
        self,
        inbox: Pairs,
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Pairs = (),
    ) -> Known:
        """What guards against a second effect; see `Transaction`."""
        return await self._opened.run("inbox look-up", lambda c: _known(c, inbox, timeouts, parked))

    async def write(self, plan: Plan, published: Sequence[int] = ()) -> list[PendingRow]:
        """Writes the plan; see `Transaction`.

        A message of the plan whose id is in the outbox already is left out: it is the same message,
        and it has left or will leave.
        """
        return await self._opened.run("write", lambda c: write_plan(c, plan, published))


# --------------------------------------------------------------------------------------- look-ups


def _correlated(on: Executor, lookups: Collection[Lookup]) -> dict[Lookup, tuple[str, ...]]:
    statement, given = _correlated_statement(on.dialect)
    asked = [(one.saga_type, one.name, one.value.encode()) for one in lookups]
    found: dict[Lookup, list[str]] = {}
    for row in on.read(statement, given.arguments(asked)):
        lookup = Lookup(saga_type=row.saga_type, name=row.name, value=row.value.decode())
        found.setdefault(lookup, []).append(row.saga_key.decode())
    rest = [one for one in lookups if one not in found]
    if rest:
        statement, given = _past_statement(on.dialect)
        asked = [(one.saga_type, one.name, one.value.encode()) for one in rest]
        for row in on.read(statement, given.arguments(asked)):
            found[Lookup(row.saga_type, row.name, row.value.decode())] = []
    return {lookup: tuple(sorted(keys)) for lookup, keys in found.items()}


@cache
def _correlated_statement(dialect: Dialect) -> tuple[Query, Given]:
    key = (correlation.c.saga_type, correlation.c.name, correlation.c.value)
    given = dialect.given(*key)
    return select(*key, correlation.c.saga_key).where(given.holds(*key)), given


@cache
def _past_statement(dialect: Dialect) -> tuple[Query, Given]:
    key = (correlation_past.c.saga_type, correlation_past.c.name, correlation_past.c.value)
    given = dialect.given(*key)
    return select(*key).where(given.holds(*key)), given


def _known(
    on: Executor,
    inbox_keys: Pairs,
    timeout_keys: Collection[tuple[str, str, int]],
    parked_keys: Pairs,
) -> Known:
    dialect = on.dialect
    known = Known(seen=set(), timeouts=set(), parked=set())
    if inbox_keys:
        statement, given = _seen(dialect)
        rows = on.read(statement, given.arguments(_encoded(inbox_keys)))
        known.seen = {(row.consumer.decode(), row.message_id.decode()) for row in rows}
    if timeout_keys:
        statement, given = _armed(dialect)
        asked = [(uid.encode(), name.encode(), number) for uid, name, number in timeout_keys]
        rows = on.read(statement, given.arguments(asked))
        known.timeouts = {(row.uid.decode(), row.name.decode(), row.generation) for row in rows}
    if parked_keys:
        statement, given = _still_parked(dialect)
        rows = on.read(statement, given.arguments(_encoded(parked_keys)))
        known.parked = {(row.consumer.decode(), row.message_id.decode()) for row in rows}
    return known


def _encoded(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    return [(first.encode(), second.encode()) for first, second in pairs]


@cache
def _seen(dialect: Dialect) -> tuple[Query, Given]:
    key = (inbox.c.consumer, inbox.c.message_id)
    given = dialect.given(*key)
    return select(*key).where(given.holds(*key)), given


@cache
def _armed(dialect: Dialect) -> tuple[Query, Given]:
    key = (timeout.c.uid, timeout.c.name, timeout.c.generation)
    given = dialect.given(*key)
    return select(*key).where(given.holds(*key)), given


@cache
def _still_parked(dialect: Dialect) -> tuple[Query, Given]:
    key = (parked.c.consumer, parked.c.message_id)
    given = dialect.given(*key)
    return select(*key).where(given.holds(*key)), given


# ------------------------------------------------------------------------------------------- locks


def _load(on: Executor, pairs: list[tuple[str, bytes]], *, wait: bool) -> Loaded:
    dialect = on.dialect
    rows = None
    if wait and not dialect.waits_for_writers:
        rows = _locked_waiting(on, pairs)
    if rows is None:
        statement, given = _load_statement(dialect, False)
        rows = on.read(statement, given.arguments(pairs))
    loaded = [instance_of(row) for row in rows]
    instances = {(instance.type, instance.key): instance for instance in loaded}
    missing = [pair for pair in pairs if (pair[0], pair[1].decode()) not in instances]
    busy: set[tuple[str, str]] = set()
    if missing and not dialect.waits_for_writers:
        # Not returned means held by somebody or absent; only a look without a lock tells which.
        statement, given = _exists(dialect)
        held = on.read(statement, given.arguments(missing))
        busy = {(row.saga_type, row.saga_key.decode()) for row in held}
    return Loaded(instances=instances, busy=busy)


def _locked_waiting(on: Executor, pairs: list[tuple[str, bytes]]) -> Any:
    """All rows, waiting in key order for each, or None when that takes too long."""
    statement, given = _load_statement(on.dialect, True)
    # Rare: one instance that was busy several times. Elsewhere there are no savepoints.
    on.write(SAVEPOINT)
    try:
        on.write(lock_timeout(WAIT_MS))
        rows = on.read(statement, given.arguments(pairs))
    except Exception as error:
        if not isinstance(translated(error, "load"), Conflict):
            raise
        on.write(ROLL_BACK)
        return None
    on.write(RELEASE)
    return rows


@cache
def _load_statement(dialect: Dialect, wait: bool) -> tuple[Query, Given]:
    key = (saga.c.saga_type, saga.c.saga_key)
    given = dialect.given(*key)
    statement = select(*saga.c).where(given.holds(*key)).order_by(*key)
    return dialect.locked(statement, saga, wait=wait, weak=True), given


@cache
def _exists(dialect: Dialect) -> tuple[Query, Given]:
    key = (saga.c.saga_type, saga.c.saga_key)
    given = dialect.given(*key)
    return select(*key).where(given.holds(*key)), given
