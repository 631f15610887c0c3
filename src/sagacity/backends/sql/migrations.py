"""The versions of the tables, and the steps from one to the next.

`metadata` always describes the newest version, so an empty database is made in one go; an older one
gets the steps it lacks, in order. The version is a row of the table `meta`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, create_mock_engine, delete, insert, inspect, select, text
from sqlalchemy.sql.ddl import DDLElement

from sagacity.backends.sql.dialects import POSTGRESQL, dialect_named, dialect_of
from sagacity.backends.sql.errors import MIGRATE
from sagacity.backends.sql.tables import SCHEMA_VERSION, meta, metadata
from sagacity.core.errors import ConfigurationError, SchemaError

Step = Callable[[Connection], None]

STEPS: dict[int, Step] = {}
"""Version -> what makes it out of the version before. Version 1 is the first: it is made whole."""

VERSION_NAME = "schema_version"
_LOCK = 0x5A6AC17  # an arbitrary number that only our migrations lock


def current(connection: Connection) -> int:
    """The version of the tables in this database; 0 where there are none."""
    if not inspect(connection).has_table(meta.name):
        return 0
    found = connection.execute(
        select(meta.c.value).where(meta.c.name == VERSION_NAME)
    ).scalar_one_or_none()
    return int(found) if found is not None else 0


def check(connection: Connection) -> None:
    """Raises SchemaError where the tables are missing, older than the code, or newer."""
    version = current(connection)
    if version == 0:
        raise SchemaError(
            f"store: expected the tables of version {SCHEMA_VERSION}, got none; {MIGRATE}"
        )
    if version < SCHEMA_VERSION:
        raise SchemaError(
            f"store: expected tables of version {SCHEMA_VERSION}, got version {version}, which is "
            f"older than this code; {MIGRATE}"
        )
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"store: expected tables of version {SCHEMA_VERSION}, got version {version}, which is "
            "newer than this code; update the code of this worker"
        )


def upgrade(connection: Connection) -> tuple[int, int]:
    """Brings the tables to the version of the code; returns the version before and after.

    Several processes may do this at once: they wait for each other. Raises SchemaError where the tables
    are newer than the code. The caller commits.
    """
    if dialect_of(connection) is POSTGRESQL:
        # SQLite needs no lock: BEGIN IMMEDIATE has it already.
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
    before = current(connection)
    if before > SCHEMA_VERSION:
        check(connection)
    if before == SCHEMA_VERSION:
        return before, before
    if before == 0:
        metadata.create_all(connection)
    else:
        for version in range(before + 1, SCHEMA_VERSION + 1):
            STEPS[version](connection)
    connection.execute(delete(meta).where(meta.c.name == VERSION_NAME))
    connection.execute(insert(meta).values(name=VERSION_NAME, value=str(SCHEMA_VERSION).encode()))
    return before, SCHEMA_VERSION


def sql(dialect_name: str, since: int = 0) -> str:
    """The DDL that `upgrade` would run on tables of version `since`, as a script.

    `dialect_name` is ``sqlite`` or ``postgresql``. Raises ConfigurationError for another one, or for a
    version that this code does not know.
    """
    dialect = dialect_named(dialect_name)
    if not 0 <= since <= SCHEMA_VERSION:
        raise ConfigurationError(
            f"migration: expected a version from 0 to {SCHEMA_VERSION}, got {since}"
        )
    lines: list[str] = []

    def note(statement: Any, *_: Any, **__: Any) -> None:
        if isinstance(statement, DDLElement):
            compiled = statement.compile(dialect=recorder.dialect)
        else:
            compiled = statement.compile(
                dialect=recorder.dialect, compile_kwargs={"literal_binds": True}
            )
        lines.append(str(compiled).strip() + ";")

    recorder: Any = create_mock_engine(f"{dialect.name}://", note)
    if since == SCHEMA_VERSION:
        return ""
    value = str(SCHEMA_VERSION).encode().hex()
    literal = f"'\\x{value}'" if dialect is POSTGRESQL else f"X'{value}'"
    if since == 0:
        metadata.create_all(recorder, checkfirst=False)
        lines.append(f"INSERT INTO {meta.name} VALUES ('{VERSION_NAME}', {literal});")  # noqa: S608
    else:
        for number in range(since + 1, SCHEMA_VERSION + 1):
            STEPS[number](recorder)
        lines.append(
            f"UPDATE {meta.name} SET value = {literal} WHERE name = '{VERSION_NAME}';"  # noqa: S608
        )
    return "\n\n".join(lines) + "\n"
