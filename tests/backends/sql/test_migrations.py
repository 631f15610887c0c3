"""Tables are made once, checked at every start, and never used when they do not fit."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from sqlalchemy import Connection, inspect, make_url, text

from sagacity.backends.sql import SqlStore, migrations
from sagacity.backends.sql.database import Database, open_engine
from sagacity.backends.sql.tables import PREFIX, SCHEMA_VERSION, metadata
from sagacity.core.errors import ConfigurationError, SchemaError
from sagacity.core.plan import Plan
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import instance

pytestmark = pytest.mark.asyncio


async def in_database(url: str, work: Any) -> Any:
    database = Database(open_engine(url), VirtualClock(), deadline_s=40, owned=True)
    try:
        return await database.write("test", work)
    finally:
        await database.close()


async def test_missing_tables_are_told_with_what_to_do(store_url: str) -> None:
    store = SqlStore(store_url)
    try:
        with pytest.raises(SchemaError, match="got none; run: saga migrate --store"):
            await store.prepare()
        await store.prepare(create=True)
        await store.prepare()
        await store.prepare(create=True)
    finally:
        await store.close()


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
async def test_another_version_is_refused(store_url: str, version: int) -> None:
    store = SqlStore(store_url)
    await in_database(store_url, migrations.upgrade)
    await in_database(
        store_url,
        lambda c: c.execute(
            text("UPDATE sagacity_meta SET value = :value WHERE name = 'schema_version'"),
            {"value": str(version).encode()},
        ),
    )
    try:
        with pytest.raises(SchemaError) as caught:
            await store.prepare()
        told = str(caught.value)
        if version > SCHEMA_VERSION:
            assert f"got version {version}, which is newer" in told
            with pytest.raises(SchemaError, match="newer"):
                await store.prepare(create=True)
        else:
            assert "saga migrate" in told
    finally:
        await store.close()


async def test_use_without_tables_is_a_schema_error(store_url: str) -> None:
    store = SqlStore(store_url, clock=VirtualClock())
    try:
        with pytest.raises(SchemaError, match="saga migrate"):
            await store.due(["Order"], 1)
        with pytest.raises(SchemaError):
            async with store.transaction() as transaction:
                await transaction.write(Plan(now=0, saga_inserts=[instance()]))
    finally:
        await store.close()


async def test_many_workers_may_create_at_once(store_url: str) -> None:
    stores = [SqlStore(store_url) for _ in range(6)]
    waiting = list(stores)

    async def create() -> None:
        await waiting.pop().prepare(create=True)

    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for _ in stores:
                    group.start_soon(create)
        for store in stores:
            await store.prepare()
    finally:
        for store in stores:
            await store.close()


async def test_the_printed_script_makes_the_same_tables(
    sqlite_url: str, postgres_url: str, tmp_path: Path
) -> None:
    file = make_url(sqlite_url).database
    assert file is not None
    with sqlite3.connect(file) as connection:
        connection.executescript(migrations.sql("sqlite"))
    url = make_url(postgres_url).set(drivername="postgresql").render_as_string(False)
    with psycopg.connect(url) as connection_:
        connection_.execute(migrations.sql("postgresql").encode())
    made = f"sqlite+aiosqlite:///{tmp_path / 'made.db'}"
    await in_database(made, migrations.upgrade)
    for scripted in (sqlite_url, postgres_url):
        store = SqlStore(scripted)
        await store.prepare()
        await store.close()
        assert await in_database(scripted, shape) == await in_database(made, shape)


async def test_the_tables_are_those_of_the_metadata(store_url: str) -> None:
    await in_database(store_url, migrations.upgrade)
    found = await in_database(store_url, shape)
    assert found == {
        table.name: (
            sorted(column.name for column in table.columns),
            [column.name for column in table.primary_key.columns],
            sorted(str(index.name) for index in table.indexes),
        )
        for table in metadata.tables.values()
    }
    assert all(name.startswith(PREFIX) for name in found)


def shape(connection: Connection) -> dict[str, Any]:
    """Columns, primary key and indexes of every table."""
    inspector = inspect(connection)
    return {
        table: (
            sorted(column["name"] for column in inspector.get_columns(table)),
            inspector.get_pk_constraint(table)["constrained_columns"],
            sorted(
                str(index["name"])
                for index in inspector.get_indexes(table)
                if not index.get("duplicates_constraint")
            ),
        )
        for table in inspector.get_table_names()
        if table != "sqlite_sequence"
    }


async def test_every_version_has_its_step() -> None:
    assert sorted(migrations.STEPS) == list(range(2, SCHEMA_VERSION + 1))


async def test_steps_run_in_order_from_the_version_found(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two imagined versions after this one."""
    await in_database(store_url, migrations.upgrade)
    done: list[int] = []

    def step(version: int) -> migrations.Step:
        def run(connection: Connection) -> None:
            connection.execute(text(f"CREATE TABLE sagacity_step_{version} (a INTEGER)"))
            done.append(version)

        return run

    newest = SCHEMA_VERSION + 2
    for version in (newest - 1, newest):
        monkeypatch.setitem(migrations.STEPS, version, step(version))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", newest)
    with pytest.raises(SchemaError, match=f"got version {SCHEMA_VERSION}, which is older"):
        await in_database(store_url, migrations.check)
    assert await in_database(store_url, migrations.upgrade) == (SCHEMA_VERSION, newest)
    assert done == [newest - 1, newest]
    await in_database(store_url, migrations.check)
    assert await in_database(store_url, migrations.upgrade) == (newest, newest)
    script = migrations.sql("sqlite", since=newest - 1)
    assert f"sagacity_step_{newest} " in script
    assert f"sagacity_step_{newest - 1} " not in script


async def test_a_script_for_an_unknown_database_or_version_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="oracle"):
        migrations.sql("oracle")
    with pytest.raises(ConfigurationError, match="from 0 to"):
        migrations.sql("sqlite", since=SCHEMA_VERSION + 1)
    assert migrations.sql("sqlite", since=SCHEMA_VERSION) == ""
