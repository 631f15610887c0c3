from __future__ import annotations

import pytest

from sagacity.backends.sql import SqlStore
from sagacity.ports import Clock
from sagacity.testing.conformance.store import StoreConformance


class PostgresDatabase:
    serial = False
    sessions = True

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self, clock: Clock) -> SqlStore:
        return SqlStore(self.url, clock=clock)


@pytest.mark.asyncio
class TestAsyncpg(StoreConformance):
    @pytest.fixture
    def database(self, postgres_url: str) -> PostgresDatabase:
        return PostgresDatabase(postgres_url)


@pytest.mark.asyncio
class TestPsycopg(StoreConformance):
    @pytest.fixture
    def database(self, psycopg_url: str) -> PostgresDatabase:
        return PostgresDatabase(psycopg_url)
