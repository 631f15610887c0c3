"""The statements of `benchmarks.bare`, on the drivers themselves.

On SQLite one for each table and batch; on PostgreSQL two, one that reads and one that writes, for there
each is a trip.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg

from benchmarks.bare_machine import Batch, Message, Row, Writes

P = "sagacity_"
# Columns, their types on PostgreSQL, and what is the same for all rows of a batch.
SAGA = "saga_type saga_key uid version status state data ledger started_at"
SAGA_TYPES = "text bytea bytea int8 text text bytea bytea int8"
SAGA_SAME = {"schema_version": "1", "updated_at": "{now}"}
INBOX = "consumer message_id"
INBOX_TYPES = "bytea bytea"
INBOX_SAME = {"outcome": "'handled'", "at": "{now}"}
OUTBOX = "message_id message_type destination lane headers body"
OUTBOX_TYPES = "bytea text text bytea bytea bytea"
OUTBOX_SAME = {"created_at": "{now}"}
TRANSITION = (
    "uid version saga_type saga_key message_id message_type handler state_from state_to status "
    "correlation_id effects entry"
)
TRANSITION_TYPES = "bytea int8 text bytea bytea text text text text text bytea bytea bytea"
TRANSITION_SAME = {"at": "{now}"}
CHANGED = SAGA.split()[2:]


def _now() -> int:
    return time.time_ns() // 1000


def _check(written: int, meant: int, what: str) -> None:
    if written != meant:
        raise RuntimeError(f"{what}: expected to write {meant} rows, got {written}")


# --------------------------------------------------------------------------------------- PostgreSQL


class _Parameters:
    """Numbers of parameters, in the order in which they are asked for."""

    def __init__(self, first: int) -> None:
        self.next = first

    def __call__(self, types: str) -> str:
        names = types.split()
        self.next += len(names)
        first = self.next - len(names)
        return ", ".join(f"${n}::{name}[]" for n, name in enumerate(names, first))


def _insert(table: str, columns: str, types: str, same: dict[str, str], number: _Parameters) -> str:
    names = ", ".join(columns.split())
    values = ", ".join(value.format(now="$1::int8") for value in same.values())
    return (
        f"INSERT INTO {P}{table} ({names}, {', '.join(same)}) SELECT {names}, {values} "
        f"FROM unnest({number(types)}) WITH ORDINALITY AS given({names}, place) ORDER BY place"
    )


_SHOWN = ", ".join(SAGA.split())
_READ = f"""
WITH locked AS (
    SELECT {_SHOWN} FROM {P}saga
    WHERE (saga_type, saga_key) IN (SELECT * FROM unnest($1::text[], $2::bytea[]))
    ORDER BY saga_type, saga_key FOR NO KEY UPDATE SKIP LOCKED
)
SELECT NULL::bytea, {_SHOWN} FROM locked
UNION ALL
SELECT message_id, {", ".join(["NULL"] * len(SAGA.split()))} FROM {P}inbox
WHERE (consumer, message_id) IN (SELECT * FROM unnest($3::bytea[], $4::bytea[]))
"""


def _write_statement() -> str:
    """Everything that a batch writes: one trip instead of one for each table."""
    number = _Parameters(2)  # the first is the time
    sagas = _insert("saga", SAGA, SAGA_TYPES, SAGA_SAME, number)
    moves = number("text bytea int8 " + " ".join(SAGA_TYPES.split()[2:]))
    inbox = _insert("inbox", INBOX, INBOX_TYPES, INBOX_SAME, number)
    outbox = _insert("outbox", OUTBOX, OUTBOX_TYPES, OUTBOX_SAME, number)
    history = _insert("transition", TRANSITION, TRANSITION_TYPES, TRANSITION_SAME, number)
    gone = number("int8")
    return f"""
WITH sagas AS ({sagas}),
moved AS (
    UPDATE {P}saga AS saga
    SET {", ".join(f"{name} = given.{name}" for name in CHANGED)},
        schema_version = 1, updated_at = $1::int8
    FROM unnest({moves}) AS given(saga_type, saga_key, before, {", ".join(CHANGED)})
    WHERE saga.saga_type = given.saga_type AND saga.saga_key = given.saga_key
        AND saga.version = given.before
    RETURNING 1
),
inbox AS ({inbox}),
fresh AS ({outbox} RETURNING seq, lane, created_at),
pending AS (INSERT INTO {P}outbox_pending SELECT seq, lane, created_at FROM fresh),
history AS ({history}),
gone AS (DELETE FROM {P}outbox_pending WHERE seq = ANY({gone}))
SELECT (SELECT count(*) FROM moved), ARRAY(SELECT seq FROM fresh)
"""


_STATEMENTS = {
    "read": _READ,
    "write": _write_statement(),
    "forget": f"DELETE FROM {P}outbox_pending WHERE seq = ANY($1::int8[])",
}
SAGA_WIDTH, INBOX_WIDTH, OUTBOX_WIDTH, TRANSITION_WIDTH = (
    len(columns.split()) for columns in (SAGA, INBOX, OUTBOX, TRANSITION)
)


def _columns(rows: list[Row], width: int) -> Iterable[Sequence[Any]]:
    return zip(*rows, strict=True) if rows else ((),) * width


# Plans are made once: with these settings, the only ones that exist use the indexes, so a plan made
# while the tables were empty is right for ever. No general program may do so.
_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "synchronous_commit": "on",
}


class PostgresqlStore:
    """One connection of asyncpg."""

    def __init__(self, url: str, prefix: str) -> None:
        self._url, self._prefix = url, prefix
        self._connection: Any
        self._do: dict[str, Any] = {}

    async def open(self) -> None:
        """Connects and prepares every statement."""
        self._connection = await asyncpg.connect(self._url, server_settings=_SETTINGS)
        for name, text in _STATEMENTS.items():
            self._do[name] = await self._connection.prepare(text)

    async def settle(
        self, messages: Sequence[Message], published: list[int]
    ) -> tuple[Writes, list[int]]:
        """One transaction; returns what to publish, and the numbers of its outbox rows."""
        do = self._do
        await self._connection.execute("BEGIN")
        pairs = sorted({(m.saga_type, m.saga_key) for m in messages})
        keys = map(list, zip(*pairs, strict=True))
        asked = [m.saga_type.encode() for m in messages], [m.id for m in messages]
        rows: list[Row] = []
        seen: list[bytes] = []
        for message_id, *row in await do["read"].fetch(*keys, *asked):
            if message_id is None:
                rows.append(tuple(row))
            else:
                seen.append(message_id)
        writes = Batch(self._prefix, _now())(messages, rows, seen)
        moved, numbers = await do["write"].fetchrow(
            writes.now,
            *_columns(writes.inserts, SAGA_WIDTH),
            *_columns(writes.updates, SAGA_WIDTH + 1),
            *_columns(writes.inbox, INBOX_WIDTH),
            *_columns(writes.outbox, OUTBOX_WIDTH),
            *_columns(writes.transitions, TRANSITION_WIDTH),
            published,
        )
        _check(moved, len(writes.updates), "update")
        await self._connection.execute("COMMIT")
        return writes, numbers

    async def forget(self, published: list[int]) -> None:
        """Deletes pending rows in a transaction of its own."""
        await self._do["forget"].fetch(published)

    async def close(self) -> None:
        """Ends the connection."""
        await self._connection.close()


# ------------------------------------------------------------------------------------------- SQLite


def _values(table: str, columns: str, same: dict[str, str]) -> str:
    names = columns.split()
    # The time is a number of ours; as text of the statement it would make a new one of each batch.
    marks = ["?"] * len(names) + [value.format(now="?") for value in same.values()]
    return f"INSERT INTO {P}{table} ({', '.join([*names, *same])}) VALUES ({', '.join(marks)})"


_SQLITE_LOAD = f"SELECT {', '.join(SAGA.split())} FROM {P}saga WHERE saga_type = ? AND saga_key = ?"
_SQLITE_SEEN = f"SELECT message_id FROM {P}inbox WHERE consumer = ? AND message_id = ?"
_SQLITE_SAGA = _values("saga", SAGA, SAGA_SAME)
_SQLITE_INBOX = _values("inbox", INBOX, INBOX_SAME)
_SQLITE_OUTBOX = _values("outbox", "seq " + OUTBOX, OUTBOX_SAME)
_SQLITE_PENDING = _values("outbox_pending", "seq lane", OUTBOX_SAME)
_SQLITE_TRANSITION = _values("transition", TRANSITION, TRANSITION_SAME)
_SQLITE_UPDATE = (
    f"UPDATE {P}saga SET {', '.join(f'{n} = ?{k}' for k, n in enumerate(CHANGED, 4))}, "
    f"schema_version = 1, updated_at = ?{len(CHANGED) + 4} "
    "WHERE saga_type = ?1 AND saga_key = ?2 AND version = ?3"
)
_SQLITE_FORGET = f"DELETE FROM {P}outbox_pending WHERE seq = ?"


class SqliteStore:
    """One connection of sqlite3, used by whichever thread calls."""

    def __init__(self, path: str, prefix: str) -> None:
        self._prefix = prefix
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for line in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 10000"):
            self._connection.execute(f"PRAGMA {line}")
        self._cursor = self._connection.cursor()
        self._last: int = self._one(f"SELECT coalesce(max(seq), 0) FROM {P}outbox")

    def _one(self, statement: str) -> Any:
        return self._connection.execute(statement).fetchone()[0]

    def settle(self, messages: Sequence[Message], published: list[int]) -> tuple[Writes, list[int]]:
        """One transaction; returns what to publish, and the numbers of its outbox rows."""
        execute = self._cursor.execute
        execute("BEGIN IMMEDIATE")
        pairs = sorted({(m.saga_type, m.saga_key) for m in messages})
        rows = [row for pair in pairs if (row := execute(_SQLITE_LOAD, pair).fetchone())]
        asked = [(m.saga_type.encode(), m.id) for m in messages]
        seen = [row[0] for pair in asked if (row := execute(_SQLITE_SEEN, pair).fetchone())]
        writes = Batch(self._prefix, _now())(messages, rows, seen)
        now = writes.now
        self._write(_SQLITE_SAGA, [(*row, now) for row in writes.inserts])
        self._write(_SQLITE_UPDATE, [(*row, now) for row in writes.updates])
        self._write(_SQLITE_INBOX, [(*row, now) for row in writes.inbox])
        # Nobody else writes, so the numbers are ours to count.
        first = self._last + 1
        self._last += len(writes.outbox)
        numbers = list(range(first, self._last + 1))
        numbered = list(zip(numbers, writes.outbox, strict=True))
        self._write(_SQLITE_OUTBOX, [(n, *row, now) for n, row in numbered])
        self._write(_SQLITE_PENDING, [(n, row[3], now) for n, row in numbered])
        self._write(_SQLITE_TRANSITION, [(*row, now) for row in writes.transitions])
        if published:
            self._cursor.executemany(_SQLITE_FORGET, [(n,) for n in published])
        execute("COMMIT")
        return writes, numbers

    def _write(self, statement: str, rows: list[Row]) -> None:
        if rows:
            self._cursor.executemany(statement, rows)
            _check(self._cursor.rowcount, len(rows), statement)

    def forget(self, published: list[int]) -> None:
        """Deletes pending rows in a transaction of its own."""
        self._cursor.execute("BEGIN IMMEDIATE")
        self._cursor.executemany(_SQLITE_FORGET, [(n,) for n in published])
        self._cursor.execute("COMMIT")

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()
