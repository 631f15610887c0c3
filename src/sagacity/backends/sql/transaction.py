"""The one transaction of a batch: read the instances and the guards, write the plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

from sqlalchemy import select, true

from sagacity.backends.sql.database import OpenTransaction
from sagacity.backends.sql.dialects import POSTGRESQL, Dialect, Given, Query, each, matches
from sagacity.backends.sql.executors import Executor
from sagacity.backends.sql.merged import write_at_once, writes_at_once
from sagacity.backends.sql.plan_writer import write_plan
from sagacity.backends.sql.reading import encoded, read_instances
from sagacity.backends.sql.tables import correlation, correlation_past, parked, timeout
from sagacity.core.plan import Known, Loaded, Plan
from sagacity.ports import Lookup, PendingRow

OPTIMISTIC_ROWS_MAX = 64
"""PostgreSQL: a batch that looks for more instances and inbox rows than this locks what it reads."""

Pairs = Collection[tuple[str, str]]


class SqlTransaction:
    """`sagacity.ports.Transaction` on an open connection.

    An optimistic one begins no transaction before it writes, and locks nothing before that: reading and
    writing are one trip each instead of five. That is for batches so small that trips are what they
    cost; a larger one on PostgreSQL takes the locks, for then losing a race costs more.
    """

    def __init__(self, opened: OpenTransaction) -> None:
        self._opened = opened
        self._read: dict[tuple[str, str], int] = {}
        """Instances that were read without a lock, and their versions."""
        self._armed: set[tuple[str, str, int]] = set()
        """Timeouts (uid, name, generation) that were read so."""

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
        """Loads the instances that are free; see `Transaction`."""
        loaded, _ = await self.read(wanted, (), wait=wait)
        return loaded

    async def known(
        self,
        inbox: Pairs,
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Pairs = (),
    ) -> Known:
        """What guards against a second effect; see `Transaction`."""
        _, known = await self.read({}, inbox, timeouts, parked)
        return known

    async def read(
        self,
        wanted: Mapping[str, Collection[str]],
        inbox: Pairs,
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Pairs = (),
        *,
        wait: bool = False,
    ) -> tuple[Loaded, Known]:
        """Both at once; see `Transaction`."""
        opened = self._opened
        keys = sorted({(kind, key.encode()) for kind, some in wanted.items() for key in some})
        if not opened.begun and (wait or self._worth_locking(len(keys) + len(inbox))):
            await opened.begin()
        lock = opened.begun

        def look(on: Executor) -> tuple[Loaded, Known]:
            loaded, seen = read_instances(on, keys, inbox, lock=lock, wait=wait)
            # After the instances are locked, for they say which of these are over.
            known = Known(
                seen=seen, timeouts=_armed_of(on, timeouts), parked=_parked_of(on, parked)
            )
            return loaded, known

        loaded, known = await opened.run("read", look)
        if not lock:
            self._read.update((key, one.version) for key, one in loaded.instances.items())
            self._armed |= known.timeouts
        return loaded, known

    async def write(self, plan: Plan, published: Sequence[int] = ()) -> list[PendingRow]:
        """Writes the plan; see `Transaction.write`.

        A message of the plan whose id is in the outbox already is left out: it is the same message,
        and it has left or will leave.
        """
        opened = self._opened
        if opened.begun and not self._read and not self._armed:
            return await opened.run("write", lambda c: write_plan(c, plan, published))
        changed = {(one.type, one.key) for one, _ in plan.saga_updates}
        unchanged = [
            (kind, key.encode(), version)
            for (kind, key), version in sorted(self._read.items())
            if (kind, key) not in changed
        ]
        if not opened.begun and opened.dialect is POSTGRESQL and writes_at_once(plan):
            return await opened.run(
                "write", lambda c: write_at_once(c, plan, published, unchanged, alone=True)
            )

        def work(on: Executor) -> list[PendingRow]:
            return write_plan(on, plan, published, unchanged, self._armed, locked=False)

        return await (opened.run if opened.begun else opened.run_whole)("write", work)

    def _worth_locking(self, rows: int) -> bool:
        return self._opened.dialect is POSTGRESQL and rows > OPTIMISTIC_ROWS_MAX


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


def _armed_of(
    on: Executor, timeouts: Collection[tuple[str, str, int]]
) -> set[tuple[str, str, int]]:
    if not timeouts:
        return set()
    statement, given = _armed(on.dialect)
    asked = [(uid.encode(), name.encode(), number) for uid, name, number in timeouts]
    rows = on.read(statement, given.arguments(asked))
    return {(row.uid.decode(), row.name.decode(), row.generation) for row in rows}


def _parked_of(on: Executor, keys: Pairs) -> set[tuple[str, str]]:
    if not keys:
        return set()
    statement, given = _still_parked(on.dialect)
    rows = on.read(statement, given.arguments(encoded(keys)))
    return {(row.consumer.decode(), row.message_id.decode()) for row in rows}


@cache
def _armed(dialect: Dialect) -> tuple[Query, Given]:
    return dialect.present(timeout.c.uid, timeout.c.name, timeout.c.generation)


@cache
def _still_parked(dialect: Dialect) -> tuple[Query, Given]:
    return dialect.present(parked.c.consumer, parked.c.message_id)
