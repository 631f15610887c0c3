"""Reading a service's database from outside, without disturbing it: for status, check and tests."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import MetaData, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from sagacity.backends.sql import SqlStore


@asynccontextmanager
async def reading(store: str) -> AsyncGenerator[AsyncConnection]:
    """A connection that only reads, all at one moment."""
    opened = SqlStore(store)
    try:
        async with opened.engine.connect() as connection:
            if opened.engine.dialect.name == "postgresql":
                await connection.execution_options(isolation_level="REPEATABLE READ")
            await connection.execution_options(sagacity_read_only=True)
            yield connection
    finally:
        await opened.close()


async def read_rows(store: str, table: Table, equal: Mapping[str, object]) -> list[dict[str, Any]]:
    """The rows of a table whose columns have these values, in the order of its primary key."""
    statement = select(table).order_by(*table.primary_key.columns)
    for name, value in equal.items():
        statement = statement.where(table.c[name] == value)
    async with reading(store) as connection:
        return [dict(row._mapping) for row in await connection.execute(statement)]  # noqa: SLF001


def table_named(metadata: MetaData, service: str, name: str) -> Table:
    """The table `SERVICE_name`; raises LookupError with the names there are."""
    try:
        return metadata.tables[f"{service}_{name}"]
    except KeyError:
        known = ", ".join(sorted(metadata.tables))
        raise LookupError(
            f"{service} has no table {service}_{name}; expected one of {known}"
        ) from None
