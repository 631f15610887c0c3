"""What SQLite and PostgreSQL do differently, in one place.

Statements here take any number of rows with a fixed text: PostgreSQL gets one array for each
column (`unnest`), SQLite gets keys as one JSON document (`json_each`) and full rows by the driver's
own loop over one prepared statement. So no batch meets a limit on bound parameters, and each
statement is compiled once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    ColumnClause,
    ColumnElement,
    Connection,
    Delete,
    FromClause,
    Integer,
    LargeBinary,
    Select,
    Subquery,
    Table,
    Text,
    Tuple,
    Update,
    bindparam,
    cast,
    column,
    delete,
    exists,
    func,
    literal_column,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.selectable import LateralFromClause
from sqlalchemy.types import TypeEngine

from sagacity.core.errors import ConfigurationError

Row = tuple[Any, ...]
"""Values of one row in the order of the columns it is for."""

if TYPE_CHECKING:
    from sagacity.backends.sql.executors import Executor

    Query = Select[*tuple[Any, ...]]
    """A statement that reads rows of whatever columns."""
else:
    Query = Select  # SQLAlchemy 2.0 has another type parameter


class Given:
    """Rows of parameters as a relation that statements can select from."""

    def __init__(
        self,
        clause: FromClause,
        arguments: Callable[[Sequence[Row]], dict[str, Any]],
        names: Sequence[str],
    ) -> None:
        self.clause = clause
        self.arguments = arguments
        self._names = tuple(names)

    @property
    def c(self) -> Any:
        """The columns."""
        return self.clause.c

    @property
    def columns(self) -> list[ColumnElement[Any]]:
        """The columns that rows are given for, in their order."""
        return [self.clause.c[name] for name in self._names]

    def holds(self, *columns: ColumnElement[Any]) -> ColumnElement[bool]:
        """True where the values of `columns` are one of the rows, in the order of their columns."""
        wanted = select(*self.columns)
        if len(columns) == 1:
            return columns[0].in_(wanted)
        return _tuple(columns).in_(wanted)


def _tuple(columns: Sequence[ColumnElement[Any]]) -> Tuple:
    return tuple_(*columns)


class Dialect(ABC):
    """How one kind of database is spoken to. The instances `SQLITE` and `POSTGRESQL` are the only ones."""

    name: ClassVar[str]
    waits_for_writers: ClassVar[bool]
    """True where a second transaction cannot begin before the first has ended."""

    def given(self, *columns: ColumnElement[Any], name: str = "given") -> Given:
        """A relation of parameter rows with the names and types of `columns`.

        Relations of one statement need different names.
        """
        return self._given(name, tuple((c.key or "", c.type) for c in columns))

    @abstractmethod
    def _given(self, name: str, columns: tuple[tuple[str, TypeEngine[Any]], ...]) -> Given: ...

    @abstractmethod
    def insert(
        self,
        on: Executor,
        table: Table,
        columns: tuple[str, ...],
        rows: Sequence[Row],
        *,
        replace: bool = False,
    ) -> int:
        """Inserts rows and returns how many; one whose key exists is left out, or replaces it."""

    @abstractmethod
    def update(
        self,
        on: Executor,
        table: Table,
        match: tuple[str, ...],
        change: tuple[str, ...],
        rows: Sequence[Row],
    ) -> int:
        """Updates the rows that match and returns how many.

        A row holds the values of `match` as they were, then those of `change` as they shall be.
        """

    def delete(
        self, on: Executor, table: Table, columns: tuple[str, ...], rows: Sequence[Row]
    ) -> int:
        """Deletes the rows with these values and returns how many."""
        if not rows:
            return 0
        statement, given = _delete(self, table, columns)
        return on.write(statement, given.arguments(rows))

    def present(self, *columns: Column[Any]) -> tuple[Query, Given]:
        """Which of the given rows a table has, by these columns of it."""
        given = self.given(*columns)
        return select(*columns).where(given.holds(*columns)), given

    def locked(
        self, statement: Query, of: Table, *, wait: bool = True, weak: bool = False
    ) -> Query:
        """`statement` with its rows of one table locked; without `wait` held rows are left out.

        A `weak` lock is enough for changes that leave the key alone.
        """
        del of, wait, weak
        return statement


class SqliteDialect(Dialect):
    """SQLite: one writer at a time, so a transaction that may write holds everything."""

    name = "sqlite"
    waits_for_writers = True

    def _given(self, name: str, columns: tuple[tuple[str, TypeEngine[Any]], ...]) -> Given:
        return _sqlite_given(name, columns)

    def insert(
        self,
        on: Executor,
        table: Table,
        columns: tuple[str, ...],
        rows: Sequence[Row],
        *,
        replace: bool = False,
    ) -> int:
        """One prepared statement, run for every row."""
        statement = _sqlite_insert(table, columns, replace)
        return on.write_each(statement, columns, rows)

    def update(
        self,
        on: Executor,
        table: Table,
        match: tuple[str, ...],
        change: tuple[str, ...],
        rows: Sequence[Row],
    ) -> int:
        """One prepared statement, run for every row."""
        statement = _sqlite_update(table, match, change)
        names = [f"old_{name}" for name in match] + [f"new_{name}" for name in change]
        return on.write_each(statement, names, rows)


class PostgresqlDialect(Dialect):
    """PostgreSQL at READ COMMITTED."""

    name = "postgresql"
    waits_for_writers = False

    def _given(self, name: str, columns: tuple[tuple[str, TypeEngine[Any]], ...]) -> Given:
        return postgresql_given(name, columns)

    def insert(
        self,
        on: Executor,
        table: Table,
        columns: tuple[str, ...],
        rows: Sequence[Row],
        *,
        replace: bool = False,
    ) -> int:
        """One statement over arrays."""
        if not rows:
            return 0
        statement, given = _postgresql_insert(table, columns, replace)
        return on.write(statement, given.arguments(rows))

    def update(
        self,
        on: Executor,
        table: Table,
        match: tuple[str, ...],
        change: tuple[str, ...],
        rows: Sequence[Row],
    ) -> int:
        """One statement over arrays."""
        if not rows:
            return 0
        statement, given = _postgresql_update(table, match, change)
        return on.write(statement, given.arguments(rows))

    def present(self, *columns: Column[Any]) -> tuple[Query, Given]:
        """See `Dialect.present`; one look for each row."""
        given = self.given(*columns)
        there = exists(
            select(ONE).where(*matches(given, columns)).correlate(given.clause).offset(_NONE)
        )
        return select(*(given.c[column.name] for column in columns)).where(there), given

    def locked(
        self, statement: Query, of: Table, *, wait: bool = True, weak: bool = False
    ) -> Query:
        """``FOR UPDATE`` or, weak, ``FOR NO KEY UPDATE``."""
        return statement.with_for_update(of=of, skip_locked=not wait, key_share=weak)


SQLITE = SqliteDialect()
POSTGRESQL = PostgresqlDialect()


def dialect_named(name: str) -> Dialect:
    """The dialect of an SQLAlchemy dialect name.

    Raises ConfigurationError for a database that this store does not speak to.
    """
    for dialect in (SQLITE, POSTGRESQL):
        if dialect.name == name:
            return dialect
    raise ConfigurationError(
        f"store: expected a database of the kind sqlite or postgresql, got {name!r}; "
        "use sqlite+aiosqlite://, postgresql+asyncpg:// or postgresql+psycopg://"
    )


def dialect_of(connection: Connection) -> Dialect:
    """The dialect of an open connection."""
    return dialect_named(connection.dialect.name)


def read(connection: Connection, statement: Query) -> Sequence[Any]:
    """All rows of a statement."""
    return connection.execute(statement).all()


@cache
def _delete(dialect: Dialect, table: Table, columns: tuple[str, ...]) -> tuple[Delete, Given]:
    key = [table.c[name] for name in columns]
    given = dialect.given(*key)
    return delete(table).where(given.holds(*key)), given


# ------------------------------------------------------------------------------------------ SQLite

UNHEX = "sagacity_unhex"
"""SQL function on our SQLite connections. The built-in ``unhex`` came with 3.41, and a JSON string
cannot carry the keys themselves: SQLite cuts it at NUL."""


def _is_bytes(type_: TypeEngine[Any]) -> bool:
    return isinstance(type_, LargeBinary)


@cache
def _sqlite_given(given_name: str, columns: tuple[tuple[str, TypeEngine[Any]], ...]) -> Given:
    outside = f"{given_name}_" + "_".join(name for name, _ in columns)
    # Text keeps the JSON a plain string parameter whatever the column types are.
    rows = func.json_each(bindparam(outside, type_=Text())).table_valued(
        "value", name=f"{given_name}_json"
    )
    shown: list[ColumnElement[Any]] = []
    for place, (name, type_) in enumerate(columns):
        value: Any = func.json_extract(rows.c.value, literal_column(f"'$[{place}]'"))
        if _is_bytes(type_):
            value = getattr(func, UNHEX)(value)
        else:
            # SQLite uses an index only as far as both sides are of one kind.
            value = cast(value, type_)
        shown.append(type_coerce(value, type_).label(name))
    hexed = [_is_bytes(type_) for _, type_ in columns]

    def arguments(values: Sequence[Row]) -> dict[str, Any]:
        document = [
            [v.hex() if h else v for v, h in zip(row, hexed, strict=True)] for row in values
        ]
        return {outside: msgspec.json.encode(document).decode()}

    return Given(select(*shown).subquery(given_name), arguments, [name for name, _ in columns])


@cache
def _sqlite_insert(table: Table, columns: tuple[str, ...], replace: bool) -> sqlite.Insert:
    statement = sqlite.insert(table).values({name: bindparam(name) for name in columns})
    if not replace:
        return statement.on_conflict_do_nothing()
    keys = [c.name for c in table.primary_key]
    return statement.on_conflict_do_update(
        index_elements=keys,
        set_={name: statement.excluded[name] for name in columns if name not in keys},
    )


@cache
def _sqlite_update(table: Table, match: tuple[str, ...], change: tuple[str, ...]) -> Update:
    return (
        update(table)
        .where(*(table.c[name] == bindparam(f"old_{name}") for name in match))
        .values({name: bindparam(f"new_{name}") for name in change})
    )


# -------------------------------------------------------------------------------------- PostgreSQL


@cache
def postgresql_given(given_name: str, columns: tuple[tuple[str, TypeEngine[Any]], ...]) -> Given:
    """Arrays of parameters as a relation; see `Dialect.given`."""
    outside = [f"{given_name}_{name}" for name, _ in columns]
    types = [_plain(type_) for _, type_ in columns]
    numbers = [isinstance(type_, Integer) for type_ in types]
    arrays = [
        _numbers(name, type_) if number else bindparam(name, type_=ARRAY(type_))
        for name, type_, number in zip(outside, types, numbers, strict=True)
    ]
    clause = (
        func.unnest(*arrays)
        .table_valued(
            *(column(name, type_) for name, type_ in columns),
            name=given_name,
            with_ordinality="place",
        )
        .render_derived(name=given_name)
    )

    def arguments(values: Sequence[Row]) -> dict[str, Any]:
        arrays = zip(*values, strict=True) if values else ((),) * len(columns)
        return {
            name: ",".join(map(str, array)) if number else array
            for name, array, number in zip(outside, arrays, numbers, strict=True)
        }

    return Given(clause, arguments, [name for name, _ in columns])


def _numbers(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """An array of numbers from one text: asyncpg takes longer to look at each than to send them all."""
    comma: ColumnElement[str] = literal_column("','")
    null: ColumnElement[str] = literal_column("'None'")
    listed = func.string_to_array(bindparam(name, type_=Text()), comma, null)
    return cast(listed, ARRAY(type_))


def _plain(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    for plain in (LargeBinary, Boolean, BigInteger, Integer, Text):
        if isinstance(type_, plain):
            return plain()
    raise TypeError(f"column type {type_!r}: expected one that the tables of this store use")


@cache
def _postgresql_insert(
    table: Table, columns: tuple[str, ...], replace: bool
) -> tuple[postgresql.Insert, Given]:
    given = POSTGRESQL.given(*(table.c[name] for name in columns))
    statement = insert_from(given, table, columns)
    if not replace:
        return statement.on_conflict_do_nothing(), given
    keys = [c.name for c in table.primary_key]
    return (
        statement.on_conflict_do_update(
            index_elements=keys,
            set_={name: statement.excluded[name] for name in columns if name not in keys},
        ),
        given,
    )


def insert_from(given: Given, table: Table, columns: Sequence[str]) -> postgresql.Insert:
    """PostgreSQL: inserts the rows of `given` in their order."""
    # It takes the numbers of an identity column in the order of the rows.
    ordered = select(*(given.c[name] for name in columns)).order_by(given.c.place)
    return postgresql.insert(table).from_select(columns, ordered)


@cache
def _postgresql_update(
    table: Table, match: tuple[str, ...], change: tuple[str, ...]
) -> tuple[Update, Given]:
    given = given_update("given", table, match, change)
    return update_from(given, table, match, change, once=True), given


def given_update(name: str, table: Table, match: Sequence[str], change: Sequence[str]) -> Given:
    """PostgreSQL: a relation of the values before and after an update; see `Dialect.update`."""
    olds = tuple((f"old_{column}", table.c[column].type) for column in match)
    news = tuple((f"new_{column}", table.c[column].type) for column in change)
    return postgresql_given(name, (*olds, *news))


def update_from(
    given: Given,
    table: Table,
    match: Sequence[str],
    change: Sequence[str],
    *,
    free: bool = False,
    once: bool = False,
) -> Update:
    """PostgreSQL: the update by a relation of `given_update`.

    A row must be locked before: another transaction's update would be written over, for PostgreSQL
    looks again at the conditions of the update, which is its place only, and not at how the place was
    found. `free` locks it here, and leaves out a row that another one holds. `once` is for a statement
    that is planned each time: statistics of a table that is mostly empty make PostgreSQL expect one row,
    and look up all places anew for each row there is.
    """
    old = (table.c[name] == given.c[f"old_{name}"] for name in match)
    found: Any = places(given, table, *old, free=free)
    if once:
        found = select(found).cte("at_once").prefix_with("MATERIALIZED")
    return (
        update(table)
        .where(place_of(table) == found.c.at)
        .values({name: found.c[f"new_{name}"] for name in change})
    )


# A plan that PostgreSQL keeps was made for tables of some size and serves them at any other. So what
# a batch repeats leaves it no choice: for each given row it looks into one index. OFFSET is what keeps
# such a look apart; without it the planner would be free to walk through the table once instead.

_NONE: ColumnElement[int] = literal_column("0")
ONE: ColumnElement[int] = literal_column("1")


def matches(given: Given, columns: Sequence[Column[Any]]) -> list[ColumnElement[bool]]:
    """The columns of a table are those of a given row of the same names."""
    return [column == given.c[column.name] for column in columns]


def each(name: str, statement: Query) -> LateralFromClause:
    """PostgreSQL: a query that is run for each row of the relations before it in the same FROM."""
    return statement.offset(_NONE).lateral(name)


def place_of(table: Table) -> ColumnElement[Any]:
    """PostgreSQL: where a row is stored; good for one statement only."""
    place: ColumnClause[Any] = column("ctid")
    place.table = table
    return place


def places(
    given: Given, table: Table, *conditions: ColumnElement[bool], free: bool = False
) -> Subquery:
    """PostgreSQL: the given rows with the places, `at`, of the rows of a table that fulfil conditions.

    `free`: locks them, and leaves out those that others hold.
    """
    looked_up = select(place_of(table).label("at")).where(*conditions).correlate(given.clause)
    if free:
        looked_up = POSTGRESQL.locked(looked_up, table, wait=False)
    found = each("found", looked_up)
    joined = given.clause.join(found, true())
    return select(found.c.at, *given.columns).select_from(joined).subquery("places")


# -------------------------------------------------------------------------------------- savepoints

SAVEPOINT = text("SAVEPOINT sagacity_wait")
RELEASE = text("RELEASE SAVEPOINT sagacity_wait")
ROLL_BACK = text("ROLLBACK TO SAVEPOINT sagacity_wait")
"""PostgreSQL: the one savepoint of ours, around statements that may wait for too long."""


@cache
def lock_timeout(milliseconds: int) -> Any:
    """PostgreSQL: how long statements of this transaction or savepoint wait for a lock."""
    return text(f"SET LOCAL lock_timeout = {int(milliseconds)}")
