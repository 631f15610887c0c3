"""psycopg, spoken to directly. Its own way of sending a list asks each value what it is; ours knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from struct import Struct, pack
from struct import error as struct_error
from typing import Any

from psycopg import AsyncConnection
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.rows import namedtuple_row
from sqlalchemy import ARRAY, BigInteger, Boolean, Executable, Integer, LargeBinary, Text
from sqlalchemy.util import await_only

from sagacity.backends.sql.dialects import POSTGRESQL, Row
from sagacity.backends.sql.executors import NOTHING, PLAN_ANEW, Compilation, Executor, Watcher

_length = Struct(">i").pack
_NULL = _length(-1)


class _Array:
    """Values of one type for PostgreSQL's binary form of an array."""

    element = 0
    """The number PostgreSQL has for the type of the values."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def items(self) -> list[bytes | None]:
        """Each value in its binary form."""
        raise NotImplementedError


class _BytesArray(_Array):
    element = 17

    def items(self) -> list[bytes | None]:
        return list(self.values)


class _TextArray(_Array):
    element = 25

    def items(self) -> list[bytes | None]:
        return [None if value is None else value.encode() for value in self.values]


class _NumberArray(_Array):
    form: Callable[[Any], bytes]

    def items(self) -> list[bytes | None]:
        form = type(self).form
        try:
            return [None if value is None else form(value) for value in self.values]
        except struct_error as error:
            raise OverflowError(str(error)) from None


class _BigIntegerArray(_NumberArray):
    element = 20
    form = Struct(">q").pack


class _IntegerArray(_NumberArray):
    element = 23
    form = Struct(">i").pack


class _BooleanArray(_NumberArray):
    element = 16
    form = Struct(">?").pack


_ARRAYS: tuple[tuple[type[Any], type[_Array], int], ...] = (
    (LargeBinary, _BytesArray, 1001),
    (Boolean, _BooleanArray, 1000),
    (BigInteger, _BigIntegerArray, 1016),
    (Integer, _IntegerArray, 1007),
    (Text, _TextArray, 1009),
)


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: _Array) -> bytes:
        items = obj.items()
        if not items:
            return pack(">iii", 0, 0, obj.element)
        parts = [pack(">iiiii", 1, int(None in items), obj.element, len(items), 1)]
        for item in items:
            if item is None:
                parts.append(_NULL)
            else:
                parts.append(_length(len(item)))
                parts.append(item)
        return b"".join(parts)


_DUMPERS = [
    (array, type(f"{array.__name__}Dumper", (_ArrayDumper,), {"oid": oid}))
    for _, array, oid in _ARRAYS
]


def array_of(type_: Any) -> type[_Array] | None:
    """How values of a parameter's type are sent; None where psycopg's own way will do."""
    if isinstance(type_, ARRAY):
        for kind, array, _ in _ARRAYS:
            if isinstance(type_.item_type, kind):
                return array
    return None


class PsycopgExecutor(Executor):
    """By psycopg's own connection; to be called inside SQLAlchemy's greenlet."""

    dialect = POSTGRESQL

    def __init__(
        self, connection: AsyncConnection[Any], compiled: Compilation, watcher: Watcher | None
    ) -> None:
        for array, dumper in _DUMPERS:
            connection.adapters.register_dumper(array, dumper)
        self._cursor = connection.cursor(row_factory=namedtuple_row)
        self._compiled = compiled
        self._watcher = watcher

    def read(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> Sequence[Any]:
        """See `Executor`."""
        self._run(statement, arguments)
        return await_only(self._cursor.fetchall())

    def write(self, statement: Executable, arguments: Mapping[str, Any] = NOTHING) -> int:
        """See `Executor`."""
        self._run(statement, arguments)
        return self._cursor.rowcount

    def write_each(self, statement: Executable, names: Sequence[str], rows: Sequence[Row]) -> int:
        """See `Executor`."""
        return sum(self.write(statement, dict(zip(names, row, strict=True))) for row in rows)

    def plan_anew(self) -> None:
        """See `Executor`."""
        await_only(self._cursor.execute(PLAN_ANEW))

    def _run(self, statement: Executable, arguments: Mapping[str, Any]) -> None:
        compiled = self._compiled(statement)
        values = compiled.named(arguments)
        if self._watcher is not None:
            self._watcher(compiled.text, values, False)
        for name, array in compiled.arrays.items():
            values[name] = array(values[name])
        await_only(self._cursor.execute(compiled.text.encode(), values or None))
