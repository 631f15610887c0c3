from __future__ import annotations

import pytest

from sagacity.backends.sql import SqlStore
from sagacity.ports import Clock
from sagacity.testing.conformance.store import StoreConformance


class SqliteFile:
    serial = True
    sessions = True

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self, clock: Clock) -> SqlStore:
        return SqlStore(self.url, clock=clock)


@pytest.mark.asyncio
class TestSqlite(StoreConformance):
    @pytest.fixture
    def database(self, sqlite_url: str) -> SqliteFile:
        return SqliteFile(sqlite_url)
