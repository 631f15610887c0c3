"""How statements reach the database: through SQLAlchemy, or by the driver's own connection.

SQLAlchemy Core is the source of every statement. What a batch repeats is compiled once in a process
and then handed to asyncpg or sqlite3 with its values by position: no cursor, no conversion of each
value, no object for each result. Our columns hold bytes, text and numbers only, so nothing is lost.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Executable
from sqlalchemy.util import await_only

from sagacity.backends.sql.dialects import POSTGRESQL, SQLITE, Dialect, Row, dialect_named

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect as Compiler

Watcher = Callable[[str, Any, bool], None]
"""Is told each statement that goes past SQLAlchemy: its text, its values, whether it has many rows."""

KEEP_PLANS = "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off"
"""PostgreSQL: plans are made once for a connection; for statements whose best plan never changes."""
PLAN_ANEW = "SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL enable_seqscan TO DEFAULT"

NOTHING: Mapping[str, Any] = {}


class Executor(ABC):
    """Runs statements inside an open transaction. Rows are tuples whose columns have names, too."""

    dialect: Dialect

    @abstractmethod
    def read(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> Sequence[Any]:
        """All rows of a statement."""

    @abstractmethod
    def write(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> int:
        """Runs a statement and returns how many rows it wrote."""

    @abstractmethod
    def write_each(self, statement: Executable, names: Sequence[str], rows: Sequence[Row]) -> int:
        """Runs a statement for each row, with its values under `names`; returns how many it wrote."""

    def plan_anew(self) -> None:  # noqa: B027 - not every executor keeps plans
        """What follows in this transaction is planned for the tables as they are now."""


class CoreExecutor(Executor):
    """By a connection of SQLAlchemy: for every driver, and for sessions of the application."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.dialect = dialect_named(connection.dialect.name)

    def read(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> Sequence[Any]:
        """See `Executor`."""
        return self.connection.execute(statement, arguments).all()

    def write(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> int:
        """See `Executor`."""
        return self._counted(statement, arguments)

    def write_each(self, statement: Executable, names: Sequence[str], rows: Sequence[Row]) -> int:
        """See `Executor`."""
        if not rows:
            return 0
        return self._counted(statement, [dict(zip(names, row, strict=True)) for row in rows])

    def _counted(self, statement: Executable, arguments: Any) -> int:
        result = self.connection.execute(
            statement,
            arguments,
            # SQLAlchemy forgets the number of rows of an insert unless told otherwise.
            execution_options={"preserve_rowcount": True},
        )
        return result.rowcount


# ---------------------------------------------------------------------------------------- compiled


class Compiled(NamedTuple):
    """A statement as a driver takes it."""

    text: str
    names: tuple[str, ...]
    """The parameters in the order of their places."""
    constants: Mapping[str, Any]
    """Values of the parameters that the statement brings along."""
    arrays: Mapping[str, Any]
    """Parameter -> what makes an array of its values, for a driver that needs it."""

    def values(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The arguments by position."""
        constants = self.constants
        return [arguments[name] if name in arguments else constants[name] for name in self.names]

    def named(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.names, self.values(arguments), strict=True))


class Compilation:
    """The statements of one engine, each compiled at its first use. Statements are made once."""

    def __init__(self, compiler: Compiler, array_of: Callable[[Any], Any] = lambda _: None) -> None:
        """`array_of`: for a type of SQLAlchemy, what the driver needs in place of a list, or None."""
        self._compiler = compiler
        self._array_of = array_of
        self._compiled: WeakKeyDictionary[Executable, Compiled] = WeakKeyDictionary()

    def __call__(self, statement: Any) -> Compiled:
        """The compiled form of a statement."""
        found = self._compiled.get(statement)
        if found is None:
            compiled = statement.compile(dialect=self._compiler)
            names = tuple(compiled.positiontup or compiled.params)
            wrapped = {name: self._array_of(bound.type) for name, bound in compiled.binds.items()}
            arrays = {name: array for name, array in wrapped.items() if array is not None}
            constants = {
                name: value for name, value in compiled.params.items() if value is not None
            }
            found = self._compiled[statement] = Compiled(compiled.string, names, constants, arrays)
        return found


class AsyncpgExecutor(Executor):
    """By asyncpg's own connection; to be called inside SQLAlchemy's greenlet."""

    dialect = POSTGRESQL

    def __init__(self, connection: Any, compiled: Compilation, watcher: Watcher | None) -> None:
        self._connection = connection
        self._compiled = compiled
        self._watcher = watcher

    def read(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> Sequence[Any]:
        """See `Executor`."""
        text, values = self._prepared(statement, arguments)
        return await_only(self._connection.fetch(text, *values, record_class=_named_record()))

    def write(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> int:
        """See `Executor`."""
        text, values = self._prepared(statement, arguments)
        # asyncpg takes a text without values for a script, whose status is that of its last part.
        status: str = await_only(self._connection.execute(text, *values))
        number = status.rpartition(" ")[2]
        return int(number) if number.isdecimal() else 0

    def write_each(self, statement: Executable, names: Sequence[str], rows: Sequence[Row]) -> int:
        """See `Executor`."""
        return sum(self.write(statement, dict(zip(names, row, strict=True))) for row in rows)

    def plan_anew(self) -> None:
        """See `Executor`."""
        await_only(self._connection.execute(PLAN_ANEW))

    def _prepared(
        self, statement: Executable, arguments: Mapping[str, Any]
    ) -> tuple[str, list[Any]]:
        compiled = self._compiled(statement)
        values = compiled.values(arguments)
        if self._watcher is not None:
            self._watcher(compiled.text, tuple(values), False)
        return compiled.text, values


class SqliteExecutor(Executor):
    """By a connection of the standard library; to be called in the thread that the driver keeps."""

    dialect = SQLITE

    def __init__(
        self, connection: sqlite3.Connection, compiled: Compilation, watcher: Watcher | None
    ) -> None:
        self._connection = connection
        self._compiled = compiled
        self._watcher = watcher

    def read(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> Sequence[Any]:
        """See `Executor`."""
        compiled = self._compiled(statement)
        cursor = self._connection.cursor()
        cursor.row_factory = _NamedRow
        values = compiled.values(arguments)
        if self._watcher is not None:
            self._watcher(compiled.text, tuple(values), False)
        return cursor.execute(compiled.text, values).fetchall()

    def write(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> int:
        """See `Executor`."""
        compiled = self._compiled(statement)
        values = compiled.values(arguments)
        if self._watcher is not None:
            self._watcher(compiled.text, tuple(values), False)
        return self._connection.execute(compiled.text, values).rowcount

    def write_each(self, statement: Executable, names: Sequence[str], rows: Sequence[Row]) -> int:
        """See `Executor`."""
        if not rows:
            return 0
        compiled = self._compiled(statement)
        values = rows
        if compiled.names != tuple(names):
            values = list(map(itemgetter(*(names.index(name) for name in compiled.names)), rows))
        if self._watcher is not None:
            self._watcher(compiled.text, values, True)
        return self._connection.executemany(compiled.text, values).rowcount


class _NamedRow(sqlite3.Row):
    """A row of SQLite whose columns are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except IndexError:
            raise AttributeError(name) from None


def _named_record() -> Any:
    """Asyncpg's record whose columns are attributes, too; made once, for asyncpg may be absent."""
    global _record
    if _record is None:
        import asyncpg

        class NamedRecord(asyncpg.Record):  # type: ignore[misc, unused-ignore]
            def __getattr__(self, name: str) -> Any:
                try:
                    return self[name]
                except KeyError:
                    raise AttributeError(name) from None

        _record = NamedRecord
    return _record


_record: Any = None
