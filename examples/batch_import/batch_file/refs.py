"""Which refs a file has already used, in bounded memory whatever their number."""

import sqlite3
from types import TracebackType
from typing import Self

CACHE_KIB = 32 * 1024
"""Memory for the pages of the index; what exceeds it goes to an unnamed temporary file."""


class SeenRefs:
    """An exact set of strings for finding the second use of a ref; close it to free the memory.

    An unnamed SQLite database lives in its page cache and spills to an already unlinked file, so
    neither a million refs nor fifty million take more than `CACHE_KIB`.
    """

    def __init__(self) -> None:
        # Never shared, but a caller may pull the reader from changing threads of a pool.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("CREATE TABLE seen (ref TEXT PRIMARY KEY) WITHOUT ROWID")
        self._connection.execute("BEGIN")
        self._add = self._connection.cursor().execute

    def add(self, ref: str) -> bool:
        """Return whether `ref` is new, and remember it."""
        return self._add("INSERT OR IGNORE INTO seen VALUES (?)", (ref,)).rowcount == 1

    def close(self) -> None:
        """Forget everything."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
