"""The whole example as processes, once with SQLite and once with PostgreSQL.

A module that asks for `program` gets one for all its tests, with real Redis, databases, remote systems
and mail sink: tests keep apart by their users, orders and batches. It may set

    PROGRAM_SETTINGS = {"SAGACITY_ATTEMPTS_MAX": "3"}      # on top of QUICK
    PROGRAM_SERVICES = ("importing",)                       # leave the others out
    PROGRAM_WORKERS = 2                                     # processes per service
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast
from uuid import uuid4

import pytest

from examples.batch_import.contexts import SERVICES
from examples.batch_import.program import Program, sqlite_stores
from tests.examples.batch_import.evidence import ObservedProgram
from tests.servers.postgres import PostgresServer
from tests.servers.redis import RedisServer

QUICK: Final = {
    "SAGACITY_SWEEP_INTERVAL_MS": "50",
    "SAGACITY_PENDING_AGE_MS": "50",
    "SAGACITY_TIMEOUTS_POLL_MS": "50",
    "SAGACITY_BACKOFF_BASE_MS": "20",
    "SAGACITY_BACKOFF_CAP_S": "0.5",
    "SAGACITY_MISSING_WINDOW_S": "5",
    "SAGACITY_BATCH_DEADLINE_MS": "1000",
    "SAGACITY_RECLAIM_IDLE_MS": "3000",
    "SAGACITY_RECLAIM_INTERVAL_MS": "500",
    "SAGACITY_LEASE_S": "2",
    "BATCH_IMPORT_REMOTE_TIMEOUT_S": "2",
}
"""Settings with which a test need not wait long for anything."""


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def service_stores(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """An empty database for each service: SQLite files, then PostgreSQL."""
    if request.param == "sqlite":
        yield sqlite_stores(tmp_path_factory.mktemp("stores"))
        return
    server = cast("PostgresServer", request.getfixturevalue("postgres_server"))
    stores = {service: server.new_database("asyncpg") for service in SERVICES}
    yield stores
    for url in stores.values():
        server.drop_database(url)


@pytest.fixture(scope="module")
def program(
    request: pytest.FixtureRequest,
    service_stores: dict[str, str],
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Program]:
    """The running program; see the module's docstring. It tells what it did when it does not rest."""
    module = request.module
    with ObservedProgram(
        tmp_path_factory.mktemp("program"),
        stores=service_stores,
        bus=redis_server.url,
        prefix=f"test-{uuid4().hex[:8]}",
        settings={**QUICK, **getattr(module, "PROGRAM_SETTINGS", {})},
        services=getattr(module, "PROGRAM_SERVICES", SERVICES),
        workers=getattr(module, "PROGRAM_WORKERS", 1),
    ) as running:
        yield running


@pytest.fixture
def batch_file(tmp_path: Path) -> Path:
    """Where a test may write its batch file."""
    return tmp_path / "batch.xml"
