"""The time of the database, known without asking it each time."""

from __future__ import annotations

import time

from sqlalchemy import text

from sagacity.backends.sql.dialects import POSTGRESQL
from sagacity.backends.sql.executors import Executor

_NOW = text("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)")


class DatabaseClock:
    """This machine's steady clock, set by the database's.

    All workers of one database agree on the time to within a network round trip, whatever the
    clocks of their machines say. SQLite has no clock of its own: there it is the machine's.
    """

    def __init__(self, *, every_s: float = 5.0) -> None:
        """`every_s`: how long one look at the database's clock is good for."""
        self._offset_us = time.time_ns() // 1000 - _steady()
        self._every_us = int(every_s * 1_000_000)
        self._set_at: int | None = None

    def now(self) -> int:
        """Microseconds since 1970, UTC."""
        return _steady() + self._offset_us

    @property
    def stale(self) -> bool:
        """True where it is time for another look."""
        return self._set_at is None or _steady() - self._set_at > self._every_us

    def look(self, on: Executor) -> None:
        """Sets the clock by the database's."""
        before = _steady()
        if on.dialect is POSTGRESQL:
            told = int(on.read(_NOW)[0][0])
        else:
            told = time.time_ns() // 1000
        after = _steady()
        self._offset_us = told - (before + after) // 2
        self._set_at = after


def _steady() -> int:
    return time.monotonic_ns() // 1000
