"""The SQL that the store really sends: ``python -m tests.backends.sql.statement_log [URL]`` prints
the statements of one committed batch."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event

from sagacity.backends.sql import SqlStore
from sagacity.core.plan import Plan
from sagacity.ports import Lookup
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import (
    correlation,
    dead_letter,
    inbox,
    instance,
    outbox,
    parked,
    timeout,
    transition,
)


@dataclass
class Statement:
    """One round trip to the database."""

    sql: str
    parameters: Any
    many: bool


@contextmanager
def logged(store: SqlStore) -> Iterator[list[Statement]]:
    """The statements of a store while the context is open, commit included."""
    statements: list[Statement] = []

    def sent(
        _connection: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, many: bool
    ) -> None:
        statements.append(Statement(sql, parameters, many))

    def committed(_connection: Any) -> None:
        statements.append(Statement("COMMIT", (), many=False))

    def watched(sql: str, parameters: Any, many: bool) -> None:
        statements.append(Statement(sql, parameters, many))

    engine, direct = store.engine.sync_engine, store._database.direct
    event.listen(engine, "before_cursor_execute", sent)
    event.listen(engine, "commit", committed)
    if direct is not None:
        direct.watcher = watched
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", sent)
        event.remove(engine, "commit", committed)
        if direct is not None:
            direct.watcher = None


async def one_batch(store: SqlStore, size: int, *, base: int = 0) -> None:
    """A batch of `size` messages for as many instances, half of them new, that touches every table."""
    numbers = range(base, base + size)
    old, new = numbers[: size // 2], numbers[size // 2 :]
    async with store.transaction() as transaction:
        plan = Plan(
            now=transaction.now,
            saga_inserts=[instance(f"o{n}") for n in old],
            parked=[parked(f"p{n}") for n in numbers],
            timeouts=[timeout("armed", key=f"o{n}") for n in old],
        )
        published = [row.seq for row in await transaction.write(plan)]
    async with store.transaction() as transaction:
        await transaction.correlated([Lookup("Order", "user", f"u{n}") for n in numbers])
        await transaction.load({"Order": [f"o{n}" for n in numbers]})
        await transaction.known(
            [("Order", f"m{n}") for n in numbers],
            [(f"uid-of-o{n}", "armed", 1) for n in old],
            [("Order", f"p{n}") for n in numbers],
        )
        plan = Plan(
            now=transaction.now,
            saga_inserts=[instance(f"o{n}") for n in new],
            saga_updates=[(instance(f"o{n}", version=2), 1) for n in old],
            inbox=[inbox(f"m{n}") for n in numbers],
            correlations=[correlation(f"u{n}", f"o{n}") for n in numbers],
            correlations_dropped=[("Order", f"o{n}") for n in old],
            outbox=[outbox(f"c{n}", f"uid-of-o{n}") for n in numbers],
            timeouts_cancelled=[(f"uid-of-o{n}", "armed") for n in old],
            timeouts=[timeout(key=f"o{n}") for n in numbers],
            unparked=[("Order", f"p{n}") for n in numbers],
            parked=[parked(f"q{n}") for n in numbers],
            released=[("Order", f"q{n}") for n in numbers],
            woken=[("Order", f"user=u{n}") for n in numbers],
            dead_letters=[dead_letter(f"d{n}") for n in numbers],
            transitions=[transition(key=f"o{n}") for n in numbers],
        )
        await transaction.write(plan, published or [1])


async def _print(url: str) -> None:
    store = SqlStore(url, clock=VirtualClock())
    await store.prepare(create=True)
    with logged(store) as statements:
        await one_batch(store, 4)
    first_commit = next(n for n, one in enumerate(statements) if one.sql == "COMMIT")
    for number, statement in enumerate(statements[first_commit + 1 :], 1):
        sys.stdout.write(
            f"-- {number}{' (for each row)' if statement.many else ''}\n{statement.sql};\n\n"
        )
    await store.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        file = f"sqlite+aiosqlite:///{Path(directory) / 'store.db'}"
        asyncio.run(_print(sys.argv[1] if len(sys.argv) > 1 else file))
