"""What to look at when the program does not come to rest: what its workers log and its databases do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sqlalchemy import make_url, text

from examples.batch_import.program import Program
from examples.batch_import.quiet import StillMoving
from examples.batch_import.reading import reading

LINES: Final = 60
"""So much of the end of each log."""

_PENDING: Final = (
    "SELECT count(*) AS rows, min(seq) AS first, max(seq) AS last, min(created_at) AS oldest "
    "FROM sagacity_outbox_pending"
)
_QUESTIONS: Final = {
    "sqlite": {"pending": _PENDING},
    "postgresql": {
        "pending": _PENDING,
        "pg_stat_activity": (
            "SELECT pid, state, wait_event_type, wait_event, pg_blocking_pids(pid) AS waits_for, "
            "clock_timestamp() - xact_start AS transaction_for, "
            "clock_timestamp() - state_change AS state_for, "
            "left(regexp_replace(query, '\\s+', ' ', 'g'), 400) AS query "
            "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "ORDER BY xact_start NULLS LAST"
        ),
        # What plans are made for, and what the tables are like.
        "statistics": (
            "SELECT told.relname, reltuples, relpages, pg_relation_size(relid) / 8192 AS pages, "
            "n_live_tup, n_dead_tup, last_autovacuum, last_autoanalyze "
            "FROM pg_stat_user_tables AS told JOIN pg_class ON pg_class.oid = relid "
            "WHERE told.relname IN ('sagacity_outbox_pending', 'sagacity_parked', 'sagacity_saga') "
            "ORDER BY told.relname"
        ),
    },
}


class ObservedProgram(Program):
    """The example, which tells what its workers and databases did when it does not come to rest."""

    def wait_until_quiet(self, deadline: float = 30.0) -> None:
        """As `Program.wait_until_quiet`; what is raised has the evidence as its note."""
        try:
            super().wait_until_quiet(deadline)
        except StillMoving as error:
            error.add_note(evidence(self))
            raise


def evidence(program: Program) -> str:
    """The last lines of each log, and what each database says of itself."""
    parts = [_tail(log) for log in sorted(program.directory.glob("*.log"))]
    for service, url in program.stores.items():
        for name, question in _QUESTIONS[make_url(url).get_backend_name()].items():
            parts.append(f"--- {service}: {name}")
            parts.append(_answer(url, question))
    return "\n".join(parts)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LINES:]
    return "\n".join([f"--- the end of {log.name}", *lines])


def _answer(url: str, question: str) -> str:
    try:
        return asyncio.run(_rows(url, question))
    except Exception as error:  # it must not hide that the program has not come to rest
        return f"no answer: {error}"


async def _rows(url: str, question: str) -> str:
    async with reading(url) as connection:
        found = (await connection.execute(text(question))).mappings()
        return "\n".join("  ".join(_told(row)) for row in found)


def _told(row: Mapping[Any, object]) -> Iterator[str]:
    return (f"{name}={value}" for name, value in row.items() if value not in (None, []))
