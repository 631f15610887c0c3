"""Servers for every test, and the rule that none of their tests is skipped on CI.

Fixtures here are plain (never `async`): they hand out URLs and server objects, and each test opens
its own connections in its own event loop.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from sagacity.backends.redis.embedded import EmbeddedRedis, EmbeddedServerMissing
from tests.servers.postgres import OwnPostgres, PostgresMissing, PostgresServer, running_postgres
from tests.servers.redis import RedisServer, running_redis

SERVER_FIXTURES = {"redis_server", "postgres_server", "private_redis", "private_postgres"}
STORES = ("sqlite", "asyncpg", "psycopg")


def on_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


# --- no skipping on CI -------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and _uses_server(item):
            item.add_marker("server")


def _uses_server(item: pytest.Function) -> bool:
    if SERVER_FIXTURES & set(item.fixturenames):
        return True
    # `store_url` asks for its server while it runs, so only its parameter tells.
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "store_url" in item.fixturenames and parameters.get("store_url") != "sqlite"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected_to_fail = hasattr(report, "wasxfail")
    if report.skipped and on_ci() and not expected_to_fail and item.get_closest_marker("server"):
        report.outcome = "failed"
        report.longrepr = f"a server test may not be skipped on CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and on_ci():
        # A whole module left out, say for a missing driver, would take its server tests along.
        report.outcome = "failed"
        report.longrepr = f"no test module may be skipped on CI: {report.longrepr}"
    return report


# --- Redis -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The Redis shared by the test run. Do not stop it: see `private_redis`."""
    with ExitStack() as running:
        try:
            server = running.enter_context(running_redis())
        except EmbeddedServerMissing as missing:
            pytest.skip(str(missing))
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    redis_server.wipe()
    return redis_server.url


@pytest.fixture
def private_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A Redis for one test, which may kill and restart it; every write is synced to disk."""
    try:
        server = EmbeddedRedis(append_only="always", data_dir=tmp_path / "redis").start()
    except EmbeddedServerMissing as missing:
        pytest.skip(str(missing))
    with server:
        yield server


# --- SQL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL shared by the test run. Do not stop it: see `private_postgres`."""
    with ExitStack() as running:
        try:
            server = running.enter_context(running_postgres())
        except PostgresMissing as missing:
            pytest.skip(str(missing))
        yield server


@pytest.fixture
def private_postgres() -> Iterator[OwnPostgres]:
    """A PostgreSQL for one test, which may kill and restart it; takes about a second to start."""
    try:
        server = OwnPostgres().start()
    except PostgresMissing as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database, for asyncpg."""
    url = postgres_server.new_database("asyncpg")
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def psycopg_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database, for psycopg."""
    url = postgres_server.new_database("psycopg")
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'store.db'}"


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, once for each kind of store."""
    fixture = {"sqlite": "sqlite_url", "asyncpg": "postgres_url", "psycopg": "psycopg_url"}
    return cast("str", request.getfixturevalue(fixture[request.param]))
