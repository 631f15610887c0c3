"""Two contexts, each with a database role and tables of its own: one being away leaves the other alone."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import make_url

from sagacity import Service
from tests.servers.postgres import PostgresServer
from tests.waiting import async_eventually
from tests.worker.running import site
from tests.worker.shop import Order, OrderPlaced, Shop

pytestmark = pytest.mark.asyncio


def _as_role(server: PostgresServer, url: str, role: str) -> str:
    """A role that may log in and owns this database only."""
    database = make_url(url).database
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'".encode())
        connection.execute(f'ALTER DATABASE "{database}" OWNER TO {role}'.encode())
        connection.execute(f'REVOKE CONNECT ON DATABASE "{database}" FROM PUBLIC'.encode())
    return make_url(url).set(username=role, password="secret").render_as_string(hide_password=False)


def _shut_out(server: PostgresServer, role: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"ALTER ROLE {role} NOLOGIN".encode())
        connection.execute(
            b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s",
            [role],
        )


def _let_in(server: PostgresServer, role: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"ALTER ROLE {role} LOGIN".encode())


@pytest.mark.requirement("R6")
async def test_a_context_without_its_database_does_not_stop_the_other(
    postgres_server: PostgresServer, redis_url: str
) -> None:
    """Payments loses its role: orders are still committed. It gets it back: everything is caught up."""
    urls = [postgres_server.new_database() for _ in range(2)]
    roles = [f"{context}_{make_url(urls[0]).database}" for context in ("sales", "payments")]
    sales_url, payments_url = (
        _as_role(postgres_server, url, role) for url, role in zip(urls, roles, strict=True)
    )
    shop = Shop()
    sales = Service("sales", sagas=[Order])
    payments = shop.service("payments", sagas=False, subscribers=False)
    try:
        async with (
            site(sales_url, redis_url) as here,
            site(payments_url, redis_url) as there,
            here.worker(sales),
            there.worker(payments),
        ):
            await here.publish(OrderPlaced("before"))
            await here.quiet(completed=1)
            _shut_out(postgres_server, roles[1])
            await here.publish(*(OrderPlaced(f"o{n}") for n in range(10)))

            async def committed() -> bool:
                counts = await here.store.counts()
                return counts["sagas.running"] == 10 and counts["outbox.pending"] == 0

            await async_eventually(committed, "ten orders committed, their commands sent")
            assert shop.did == [("charge", "before"), ("ship", "before")]
            _let_in(postgres_server, roles[1])
            await here.quiet(completed=11, seconds=60)
        assert all(shop.times("ship", f"o{n}") == 1 for n in range(10))
    finally:
        for url in urls:
            postgres_server.drop_database(url)
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            for role in roles:
                connection.execute(f"DROP ROLE {role}".encode())
