"""A commit whose answer never came: told as Unavailable, and running the batch again is right."""

from __future__ import annotations

import anyio
import pytest
from sqlalchemy import make_url, text

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.links import AsyncpgLink, PsycopgLink
from sagacity.core.errors import Conflict, Unavailable
from sagacity.core.plan import Plan
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.stores import inbox, instance, outbox
from tests.servers.postgres import OwnPostgres
from tests.servers.proxy import TcpProxy

pytestmark = pytest.mark.asyncio

DRIVERS = ["asyncpg", "psycopg"]


def batch() -> Plan:
    return Plan(now=1, saga_inserts=[instance()], inbox=[inbox()], outbox=[outbox("c1", "lane")])


@pytest.fixture(params=DRIVERS)
def server_url(request: pytest.FixtureRequest) -> str:
    name = {"asyncpg": "postgres_url", "psycopg": "psycopg_url"}[request.param]
    return str(request.getfixturevalue(name))


async def terminate_others(store: SqlStore) -> None:
    async with store.engine.connect() as connection:
        await connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )


async def test_a_connection_cut_before_the_commit(server_url: str) -> None:
    store, operator = SqlStore(server_url), SqlStore(server_url)
    try:
        await store.prepare(create=True)
        with pytest.raises(Unavailable):
            async with store.transaction() as transaction:
                await transaction.write(batch())
                await terminate_others(operator)
        assert store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert await store.saga("Order", "o1") is None
        async with store.transaction() as transaction:  # running it again is all there is to do
            await transaction.write(batch())
        assert await store.saga("Order", "o1") == instance()
    finally:
        await store.close()
        await operator.close()


@pytest.mark.parametrize("optimistic", [False, True])
async def test_a_connection_cut_in_the_middle(server_url: str, optimistic: bool) -> None:
    store, operator = SqlStore(server_url), SqlStore(server_url)
    try:
        await store.prepare(create=True)
        with pytest.raises(Unavailable):
            async with store.transaction(optimistic=optimistic) as transaction:
                await transaction.load({"Order": ["o1"]})
                await terminate_others(operator)
                await transaction.write(batch())
        assert await operator.saga("Order", "o1") is None
        async with store.transaction(optimistic=optimistic) as transaction:
            await transaction.write(batch())
        assert await operator.saga("Order", "o1") == instance()
    finally:
        await store.close()
        await operator.close()


@pytest.mark.parametrize("optimistic", [False, True])
async def test_an_answer_to_commit_that_never_comes(server_url: str, optimistic: bool) -> None:
    """The rows are there although the client saw an error; the inbox tells the second run.

    The one statement of an optimistic batch is its commit.
    """
    commit = b"uid-of-o1" if optimistic else b"COMMIT"
    url = make_url(server_url)
    assert url.port is not None
    async with TcpProxy(url.port) as proxy:
        broken = url.set(host="127.0.0.1", port=proxy.port)
        if url.get_driver_name() == "psycopg":
            broken = broken.update_query_dict({"sslmode": "disable"})
        store = SqlStore(broken, clock=VirtualClock())
        honest = SqlStore(server_url, clock=VirtualClock())
        try:
            await store.prepare(create=True)
            with pytest.raises(Unavailable):
                async with store.transaction(optimistic=optimistic) as transaction:
                    await transaction.load({"Order": ["o1"]})
                    proxy.cut_reply_to(commit)
                    await transaction.write(batch())
            assert proxy.cut >= 1
            assert await honest.saga("Order", "o1") == instance()
            with pytest.raises(Conflict):
                async with store.transaction(optimistic=optimistic) as transaction:
                    assert (await transaction.known([("Order", "m1")])).seen == {("Order", "m1")}
                    await transaction.write(batch())
            assert len(await honest.pending(10**18, 10)) == 1
        finally:
            await store.close()
            await honest.close()


async def test_a_session_of_a_pooler_is_no_place_for_settings(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler answers with a number of its own for the server's process."""
    for link in (AsyncpgLink, PsycopgLink):
        monkeypatch.setattr(link, "_backend", lambda _: 1)
    store = SqlStore(server_url)
    try:
        await store.prepare(create=True)
        for _ in range(2):
            async with store.transaction(optimistic=True) as transaction:
                await transaction.load({"Order": ["o1"]})
                await transaction.write(Plan(now=transaction.now))
        async with store.transaction(optimistic=True) as transaction:
            await transaction.write(batch())
        assert await store.saga("Order", "o1") == instance()
        async with store.engine.connect() as connection:
            shown = await connection.scalar(text("SHOW enable_seqscan"))
            assert shown == "on"
    finally:
        await store.close()


async def test_a_server_that_freezes(postgres_url: str) -> None:
    """No answer, no end of the connection: the deadline gives it up."""
    url = make_url(postgres_url)
    assert url.port is not None
    async with TcpProxy(url.port) as proxy:
        store = SqlStore(
            url.set(host="127.0.0.1", port=proxy.port), clock=VirtualClock(), deadline_s=2.0
        )
        try:
            await store.prepare(create=True)
            with anyio.fail_after(20), pytest.raises(Unavailable, match=r"within 2 s"):
                async with store.transaction() as transaction:
                    await transaction.load({"Order": ["o1"]})
                    proxy.freeze()
                    await transaction.write(batch())
            assert store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            proxy.thaw()
            async with store.transaction() as transaction:
                await transaction.write(batch())
        finally:
            await store.close()


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_server_that_is_killed_and_comes_back(
    private_postgres: OwnPostgres, driver: str
) -> None:
    store = SqlStore(private_postgres.new_database(driver))
    try:
        await store.prepare(create=True)
        async with store.transaction() as transaction:
            await transaction.write(batch())
        with pytest.raises(Unavailable):
            async with store.transaction() as transaction:
                await transaction.load({"Order": ["o1"]})
                private_postgres.kill()
                await transaction.write(Plan(now=2, inbox=[inbox("m2")]))
        with pytest.raises(Unavailable):
            await store.due(["Order"], 1)
        private_postgres.restart()
        async with store.transaction() as transaction:
            loaded = await transaction.load({"Order": ["o1"]})
            assert loaded.instances["Order", "o1"] == instance()
            assert (await transaction.known([("Order", "m2")])).seen == set()
    finally:
        await store.close()
