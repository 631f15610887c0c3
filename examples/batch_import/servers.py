"""The servers that the program needs and this machine may not have: Redis, and room for databases."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from examples.batch_import.contexts import SERVICES
from examples.batch_import.program import Program, sqlite_stores
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.worker.opening import full_store_url


class Servers:
    """A private Redis, a database for each service, and the program on them, inside ``with``.

    `store` is the URL of a PostgreSQL database in whose server the services' databases are made,
    named `NAME_importing` and so on after it; without it they are SQLite files in `directory`. With
    `keep` they stay, and are used again the next time; otherwise their names are new ones.
    """

    def __init__(
        self, directory: Path, *, store: str = "", workers: int = 1, keep: bool = False
    ) -> None:
        self._directory = directory
        self._store = make_url(full_store_url(store)) if store else None
        self._workers = workers
        self._keep = keep
        self._stack = ExitStack()
        self.redis = EmbeddedRedis(append_only="everysec", data_dir=directory / "redis")
        self.program: Program

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.redis)
            stores = sqlite_stores(self._directory)
            if self._store is not None:
                stores = asyncio.run(
                    _make_databases(self._store, "" if self._keep else f"_{token_hex(4)}")
                )
                if not self._keep:
                    stack.callback(lambda: asyncio.run(_drop_databases(stores)))
            self.program = Program(
                self._directory, stores=stores, bus=self.redis.url, workers=self._workers
            )
            stack.enter_context(self.program)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


async def _make_databases(base: URL, suffix: str) -> dict[str, str]:
    stores: dict[str, str] = {}
    async with _administration(base) as connection:
        for service in SERVICES:
            name = f"{base.database or 'batch_import'}_{service}{suffix}"
            known = text("SELECT 1 FROM pg_database WHERE datname = :name")
            if await connection.scalar(known, {"name": name}) is None:
                await connection.execute(text(f'CREATE DATABASE "{name}"'))
            stores[service] = base.set(database=name).render_as_string(hide_password=False)
    return stores


async def _drop_databases(stores: dict[str, str]) -> None:
    for url in map(make_url, stores.values()):
        with contextlib.suppress(OSError):
            async with _administration(url) as connection:
                drop = f'DROP DATABASE IF EXISTS "{url.database}" WITH (FORCE)'
                await connection.execute(text(drop))


@asynccontextmanager
async def _administration(url: URL) -> AsyncGenerator[AsyncConnection]:
    """A connection to the server itself, outside of any transaction."""
    engine = create_async_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()
