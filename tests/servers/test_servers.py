"""The servers of the tests keep what was committed over a crash, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers.postgres import OwnPostgres, PostgresFailed, PostgresServer
from tests.servers.redis import RedisServer
from tests.waiting import alive, eventually

pytestmark = pytest.mark.server

KILLED_PARENT = """
import sys, threading
{make}
# Started by a thread that ends at once: the server belongs to the process, not to the thread.
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
print(server.pid, server.{directory}, flush=True)
sys.stdin.read()
"""
REDIS_PARENT = KILLED_PARENT.format(
    make="from sagacity.backends.redis.embedded import EmbeddedRedis; server = EmbeddedRedis()",
    directory="_directory",
)
POSTGRES_PARENT = KILLED_PARENT.format(
    make="from tests.servers.postgres import OwnPostgres; server = OwnPostgres(durable=False)",
    directory="directory",
)


@pytest.mark.parametrize("program", [REDIS_PARENT, POSTGRES_PARENT], ids=["redis", "postgres"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_server_and_files_go_when_the_program_is_killed(program: str, how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().split()
        assert alive(int(pid))
        parent.send_signal(how)
    eventually(lambda: not alive(int(pid)), "the end of the server")
    eventually(lambda: not Path(directory).exists(), "the removal of its files")


def test_redis_shared_by_the_run_is_empty_for_each_test(
    redis_server: RedisServer, redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "over")
        redis_server.wipe()
        assert client.dbsize() == 0


# --- PostgreSQL --------------------------------------------------------------------------------


def test_postgres_keeps_commits_over_kill_and_restart(private_postgres: OwnPostgres) -> None:
    with psycopg.connect(private_postgres.url) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        connection.execute("CREATE TABLE kept AS SELECT 42 AS value")
    pid = private_postgres.pid
    children = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    assert children
    private_postgres.kill()
    assert not any(alive(process) for process in (pid, *children))
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(private_postgres.url)
    private_postgres.restart()
    for url in (private_postgres.url, private_postgres.socket_url):
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT value FROM kept").fetchone() == (42,)


@pytest.mark.requirement("R8")
def test_the_whole_suite_runs_without_two_phase_commit(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.url) as connection:
        assert connection.execute("SHOW max_prepared_transactions").fetchone() == ("0",)


def test_postgres_leaves_nothing_behind() -> None:
    server = OwnPostgres(durable=False).start()
    pid, directory = server.pid, server.directory
    assert (directory / "data").is_dir()
    server.stop()
    server.stop()
    assert not alive(pid)
    assert not directory.exists()


def test_postgres_that_refuses_its_settings_shows_its_log() -> None:
    with pytest.raises(PostgresFailed, match="unrecognized configuration parameter"):
        OwnPostgres(durable=False, settings={"no_such_setting": "1"}).start()


def test_postgres_databases_are_separate(
    postgres_server: PostgresServer, postgres_url: str, psycopg_url: str
) -> None:
    assert postgres_url.startswith("postgresql+asyncpg://")
    assert psycopg_url.startswith("postgresql+psycopg://")
    assert postgres_url.rsplit("/", 1)[1] != psycopg_url.rsplit("/", 1)[1]
    url = postgres_server.new_database("psycopg")
    plain = url.replace("+psycopg", "")
    with psycopg.connect(plain) as in_use:
        in_use.execute("SELECT 1")
        postgres_server.drop_database(url)
        with pytest.raises(psycopg.OperationalError):
            in_use.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(plain)


@pytest.mark.asyncio
async def test_every_store_url_opens_an_empty_database(store_url: str) -> None:
    engine = create_async_engine(store_url)
    try:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE fresh (value INTEGER)"))
            await connection.execute(text("INSERT INTO fresh VALUES (1)"))
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT value FROM fresh"))).scalar() == 1
    finally:
        await engine.dispose()


# --- the rule about skipping -------------------------------------------------------------------

SKIPPING = """
import pytest

@pytest.mark.server
def test_of_a_server():
    pytest.skip("no server here")

def test_of_no_server():
    pytest.skip("not on this platform")

@pytest.mark.server
@pytest.mark.xfail(reason="known")
def test_known_to_fail():
    raise AssertionError
"""
SKIPPING_MODULE = """
import pytest
pytest.importorskip("no_such_driver")
"""


@pytest.mark.parametrize(
    ("ci", "source", "outcome"),
    [
        pytest.param("", SKIPPING, "2 skipped, 1 xfailed", id="test"),
        pytest.param("true", SKIPPING, "1 failed, 1 skipped, 1 xfailed", id="test-on-ci"),
        pytest.param("", SKIPPING_MODULE, "1 skipped", id="module"),
        pytest.param("true", SKIPPING_MODULE, "1 error", id="module-on-ci"),
    ],
)
def test_skipped_server_test_fails_on_ci(
    tmp_path: Path, ci: str, source: str, outcome: str
) -> None:
    (tmp_path / "test_inner.py").write_text(source)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "tests.conftest", "--rootdir", str(tmp_path), str(tmp_path)),
            *("-c", "/dev/null", "-W", "ignore"),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CI": ci},
    )
    assert outcome in run.stdout, run.stdout + run.stderr
