"""The servers of a run: one PostgreSQL, and for each system a database and a Redis of its own."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy import make_url

from sagacity.backends.redis.embedded import EmbeddedRedis
from tests.servers.postgres import OwnPostgres

POSTGRESQL_SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "max_connections": "1000",
}
"""Beside the defaults: fsync, full_page_writes and synchronous_commit are on."""


@dataclass(frozen=True)
class Place:
    """Where one system works: an empty database and an empty Redis."""

    store: str
    """Without a driver: ``postgresql://...`` or ``sqlite:///path``."""
    redis: str
    log: Path


class Servers:
    """Started when they are first needed, gone with all data on exit."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._postgres = OwnPostgres(durable=True, settings=POSTGRESQL_SETTINGS)
        self._numbers = itertools.count(1)
        self._folder = Path()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(
                prefix="sagacity-bench-", ignore_cleanup_errors=True
            )
            self._folder = Path(stack.enter_context(folder))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def place(self, store: str, name: str) -> Iterator[Place]:
        """A fresh place on "postgresql" or "sqlite"; gone on exit."""
        number = next(self._numbers)
        log = self._folder / f"{number}-{name}.log"
        with EmbeddedRedis() as redis:
            if store == "sqlite":
                with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                    yield Place(f"sqlite:///{folder}/bench.db", redis.url, log)
                return
            if not self._postgres.running:
                self._stack.enter_context(self._postgres)
            made = self._postgres.new_database()
            database = make_url(made).database
            try:
                # The unix socket, in the form that libpq, asyncpg and SQLAlchemy understand.
                socket = f"host={self._postgres.directory}&port={self._postgres.port}"
                url = f"postgresql://postgres@/{database}?{socket}"
                yield Place(url, redis.url, log)
            finally:
                self._postgres.drop_database(made)
