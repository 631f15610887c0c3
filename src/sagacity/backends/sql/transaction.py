"""The one transaction of a batch: load under locks, read the guards, write the plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

from sqlalchemy import case, exists, literal_column, null, select, true

from sagacity.backends.sql.database import OpenTransaction
from sagacity.backends.sql.dialects import (
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
    if dialect is not POSTGRESQL:
        return select(*key, correlation.c.saga_key).where(given.holds(*key)), given
    of_value = select(correlation.c.saga_key).where(*matches(given, key)).correlate(given.clause)
    found = each("found", of_value)
    joined = given.clause.join(found, true())
    return select(*given.columns, found.c.saga_key).select_from(joined), given


@cache
def _past_statement(dialect: Dialect) -> tuple[Query, Given]:
    return dialect.present(
        correlation_past.c.saga_type, correlation_past.c.name, correlation_past.c.value
    )


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
    return dialect.present(inbox.c.consumer, inbox.c.message_id)


@cache
def _armed(dialect: Dialect) -> tuple[Query, Given]:
    return dialect.present(timeout.c.uid, timeout.c.name, timeout.c.generation)


@cache
def _still_parked(dialect: Dialect) -> tuple[Query, Given]:
    return dialect.present(parked.c.consumer, parked.c.message_id)


# ------------------------------------------------------------------------------------------- locks


def _load(on: Executor, pairs: list[tuple[str, bytes]], *, wait: bool) -> Loaded:
    loaded = Loaded(instances={}, busy=set())
    if on.dialect is POSTGRESQL:
        if wait:
            _wait_for_locks(on, pairs)
        statement, given = _postgresql_load()
    else:
        statement, given = _sqlite_load()
    for is_held, *row in on.read(statement, given.arguments(pairs)):
        if is_held:
            loaded.busy.add((row[0], row[1].decode()))
        elif is_held is None:
            instance = instance_of(row)
            loaded.instances[instance.type, instance.key] = instance
    return loaded


def _wait_for_locks(on: Executor, pairs: list[tuple[str, bytes]]) -> None:
    """Waits in key order for each instance and locks it; when that takes too long, for none.

    Rare: for one instance that was busy several times. Nothing else needs savepoints.
    """
    statement, given = _waiting_load()
    on.write(SAVEPOINT)
    try:
        on.write(lock_timeout(WAIT_MS))
        on.read(statement, given.arguments(pairs))
    except Exception as error:
        if not isinstance(translated(error, "load"), Conflict):
            raise
        on.write(ROLL_BACK)
        return
    on.write(RELEASE)


_KEY = (saga.c.saga_type, saga.c.saga_key)


@cache
def _sqlite_load() -> tuple[Query, Given]:
    given = SQLITE.given(*_KEY)
    # Whoever may write holds the whole file, so nothing is ever held by others.
    return select(null().label("is_held"), *saga.c).where(given.holds(*_KEY)), given


@cache
def _waiting_load() -> tuple[Query, Given]:
    given = POSTGRESQL.given(*_KEY)
    return _locked_by_key(given, wait=True), given


@cache
def _postgresql_load() -> tuple[Query, Given]:
    """The instances that are free, and for the other keys whether somebody holds one.

    Not locked means held or absent; only a look without a lock tells which.
    """
    given = POSTGRESQL.given(*_KEY)
    return _locked_by_key(given, wait=False), given


def _locked_by_key(given: Given, *, wait: bool) -> Query:
    """Locks in the order of the given keys, which everybody sorts."""
    of_key = select(*saga.c).where(*matches(given, _KEY)).correlate(given.clause)
    locked = each("locked", POSTGRESQL.locked(of_key, saga, wait=wait, weak=True))
    there = exists(of_key.with_only_columns(literal_column("1")).offset(literal_column("0")))
    is_held = case((locked.c.uid.is_(None), there)).label("is_held")
    rest = list(locked.c)[len(_KEY) :]
    return select(is_held, *given.columns, *rest).select_from(
        given.clause.outerjoin(locked, true())
    )
