"""Hail a ride: listeners of one execution, of the application, and over the bus."""

from __future__ import annotations

import ast
import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

import examples.hail_ride
from examples.hail_ride import __main__ as demo
from examples.hail_ride import drivers
from examples.hail_ride.analytics import Analytics
from examples.hail_ride.hailing import Hailing, HailRide, Ride
from examples.hail_ride.messages import (
    CouldNotHail,
    FindDriver,
    NotifyPassenger,
    RequestRide,
    RideHailed,
)
from examples.hail_ride.notices import Notice
from examples.hail_ride.service import SERVICES, create_tables, hailing_service
from examples.hail_ride.ways_in import command_line, http
from sagacity import CommandFailed, Event, Service, handles
from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.database import READ_ONLY
from sagacity.backends.sql.session import SagaSession, session_factory
from sagacity.backends.sql.tables import outbox
from sagacity.codec import envelope_from
from sagacity.core.delivery import Envelope
from sagacity.core.plan import TransitionRow
from sagacity.listeners import Listeners
from sagacity.service import Reply
from sagacity.testing.clock import VirtualClock
from sagacity.testing.inline import Inline
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually

Sessions = async_sessionmaker[SagaSession]


@asynccontextmanager
async def inline(url: str, *services: Service) -> AsyncIterator[tuple[Inline, Sessions]]:
    clock = VirtualClock()
    store = SqlStore(url, clock=clock)
    try:
        async with Inline(*(services or SERVICES), store=store, clock=clock) as app:
            await create_tables(store.engine)
            yield app, session_factory(store, service=hailing_service)
    finally:
        await store.close()


async def read(engine: AsyncEngine, statement: Any) -> list[Any]:
    async with engine.connect() as connection:
        await connection.execution_options(**{READ_ONLY: True})
        return list((await connection.execute(statement)).all())


async def stored(engine: AsyncEngine) -> list[Envelope]:
    rows = await read(engine, select(outbox.c.headers, outbox.c.body).order_by(outbox.c.seq))
    return [envelope_from(row.headers, row.body) for row in rows]


async def told(engine: AsyncEngine) -> list[tuple[str, str]]:
    rows = await read(engine, select(Notice.passenger, Notice.text).order_by(Notice.passenger))
    return [(row.passenger, row.text) for row in rows]


# --- the domain alone ----------------------------------------------------------------------------


@pytest.mark.requirement("R59", "R44")
def test_the_domain_needs_neither_network_nor_database(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: object, **__: object) -> None:
        raise AssertionError("the domain opened a socket")

    monkeypatch.setattr(socket, "socket", blocked)
    assert list(Ride.hail("r1", "ann", "Mission").pending_events) == [
        RideHailed("r1", "ann", "Mission")
    ]
    assert list(Ride.hail("r2", "cid", "Alcatraz").pending_events) == [
        CouldNotHail("r2", "cid", "we do not serve Alcatraz")
    ]


@pytest.mark.requirement("R2", "R28")
def test_no_part_imports_another() -> None:
    directory = Path(next(iter(examples.hail_ride.__path__)))
    parts = {"hailing", "drivers", "notices", "analytics"}
    for part in sorted(parts):
        tree = ast.parse((directory / f"{part}.py").read_text(encoding="utf-8"))
        imported = {
            node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        } | {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        others = {f"examples.hail_ride.{other}" for other in parts - {part}}
        assert not imported & others, part
        assert "examples.hail_ride" not in imported


# --- one execution, the application --------------------------------------------------------------


@pytest.mark.requirement("R3", "R4", "R5")
@pytest.mark.asyncio
async def test_the_caller_learns_the_outcome_and_the_application_hears_of_all(
    sqlite_url: str,
) -> None:
    application, analytics = Listeners(), Analytics()
    analytics.listen_to(application)
    outcomes: list[Event] = []
    async with inline(sqlite_url) as (app, sessions):
        first = HailRide(sessions).on(RideHailed, outcomes.append)
        await first.announcing_to(application)("r1", "ann", "Mission")
        second = HailRide(sessions).on(CouldNotHail, outcomes.append)
        await second.announcing_to(application)("r2", "cid", "Alcatraz")
        await HailRide(sessions).announcing_to(application)("r3", "bob", "Sunset")
        assert outcomes == [
            RideHailed("r1", "ann", "Mission"),
            CouldNotHail("r2", "cid", "we do not serve Alcatraz"),
        ], "the third run had no listener of its own"
        assert analytics.counts == {"RideHailed": 2, "CouldNotHail": 1}
        await app.run()
        assert app.messages(CouldNotHail) == [outcomes[1]], "the failure is stored and published"


@pytest.mark.requirement("R2", "R15")
@pytest.mark.asyncio
async def test_hailing_works_with_every_listener_gone(sqlite_url: str) -> None:
    async with inline(sqlite_url, hailing_service) as (app, sessions):
        await HailRide(sessions)("r1", "ann", "Mission")
        await app.run()
        seen = await app.saga(Hailing, "r1")
        assert (seen.state, seen.pending) == ("searching", ["drivers.FindDriver"])


@pytest.mark.asyncio
async def test_what_is_not_committed_is_not_announced(sqlite_url: str) -> None:
    heard: list[Event] = []
    async with inline(sqlite_url) as (app, sessions):
        await HailRide(sessions)("r1", "ann", "Mission")
        again = HailRide(sessions).on(RideHailed, heard.append)
        await again("r1", "ann", "Mission")
        assert heard == [], "the same ride twice is one ride"
        await app.run()
        assert len(app.messages(RideHailed)) == 1


# --- asynchronous --------------------------------------------------------------------------------


@pytest.mark.requirement("R10", "R21")
@pytest.mark.parametrize(
    ("pickup", "text"),
    [("Mission", "Doc Brown is on the way"), ("Sunset", "sorry, nobody drives")],
    ids=["found", "not-found"],
)
@pytest.mark.asyncio
async def test_hailing_answers_at_once_and_the_passenger_is_told_once(
    sqlite_url: str, pickup: str, text: str
) -> None:
    searching, may_end = asyncio.Event(), asyncio.Event()

    @handles(FindDriver)
    async def slow_search(command: FindDriver) -> Reply:
        searching.set()
        await may_end.wait()
        return await drivers.find_driver(command)

    services = (hailing_service, Service("drivers", handlers=[slow_search]), SERVICES[2])
    async with inline(sqlite_url, *services) as (app, sessions):
        await HailRide(sessions)("r1", "ann", pickup)
        running = asyncio.create_task(app.run())
        await searching.wait()
        assert (await app.saga(Hailing, "r1")).state == "searching", "hailing has long returned"
        engine = sessions.kw["bind"]
        assert await told(engine) == []
        may_end.set()
        await running
        assert await told(engine) == [("ann", text)]
        found = next(one for one in app.published if one.type == "rides.RideHailed")
        for _ in range(10):
            await app.deliver(found)
        await app.run()
        assert await told(engine) == [("ann", text)], "the same event again tells nobody again"
        assert await app.dead_letters() == []


@pytest.mark.requirement("R25")
@pytest.mark.asyncio
async def test_a_failed_follow_up_neither_undoes_what_led_to_it_nor_disappears(
    sqlite_url: str,
) -> None:
    @handles(NotifyPassenger)
    async def gateway_is_gone(command: NotifyPassenger) -> None:
        raise ConnectionError("gateway is gone")

    services = (hailing_service, SERVICES[1], Service("notices", handlers=[gateway_is_gone]))
    async with inline(sqlite_url, *services) as (app, sessions):
        await HailRide(sessions)("r1", "ann", "Mission")
        await app.run()
        await app.advance(timedelta(days=2))
        assert [row.id for row in await read(sessions.kw["bind"], select(Ride.id))] == ["r1"]
        assert len(app.messages(RideHailed)) == 1
        (failure,) = app.messages(CommandFailed)
        assert "gateway is gone" in failure.reason
        (dead,) = await app.dead_letters()
        assert "in gateway_is_gone" in dead.row.error
        assert (await app.saga(Hailing, "r1")).status == "compensated"


def story(history: list[TransitionRow]) -> list[tuple[str, str, str]]:
    return [(row.message_type, row.state_from, row.state_to) for row in history]


@pytest.mark.requirement("R9")
@pytest.mark.asyncio
async def test_the_same_saga_runs_inline_and_over_the_bus_with_the_same_result(
    tmp_path: Path, redis_url: str
) -> None:
    rides = [("r1", "ann", "Mission"), ("r2", "bob", "Sunset")]
    async with inline(f"sqlite+aiosqlite:///{tmp_path / 'inline.db'}") as (app, sessions):
        for ride in rides:
            await HailRide(sessions)(*ride)
        await app.run()
        inline_stories = [story(await app.history(Hailing, ride[0])) for ride in rides]
        inline_states = [(await app.saga(Hailing, ride[0])).state for ride in rides]
        inline_told = await told(sessions.kw["bind"])

    store = SqlStore(f"sqlite+aiosqlite:///{tmp_path / 'bus.db'}")
    await store.prepare(create=True)
    await create_tables(store.engine)
    settings = Settings(read_block_ms=50, sweep_interval_ms=50)
    buses = [RedisBus(redis_url) for _ in SERVICES]
    workers = [
        Worker(service, store, bus, settings, consumer=service.name)
        for service, bus in zip(SERVICES, buses, strict=True)
    ]
    async with anyio.create_task_group() as tasks:
        for worker in workers:
            tasks.start_soon(worker.run)
        sessions = session_factory(store, service=hailing_service)
        for ride in rides:
            await HailRide(sessions)(*ride)

        async def finished() -> bool:
            found = [await store.saga("Hailing", ride[0]) for ride in rides]
            return all(one is not None and one.status.finished for one in found)

        await async_eventually(finished, "both sagas finish over the bus", 60)
        for worker in workers:
            worker.stop()
    bus_stories = [story(await store.history("Hailing", ride[0])) for ride in rides]
    instances = [await store.saga("Hailing", ride[0]) for ride in rides]
    assert bus_stories == inline_stories
    assert [one.state for one in instances if one] == inline_states == ["told", "told"]
    assert await told(store.engine) == inline_told
    for bus in buses:
        await bus.close()
    await store.close()


# --- ways in -------------------------------------------------------------------------------------


@pytest.mark.requirement("R60")
@pytest.mark.parametrize("pickup", ["Mission", "Alcatraz"])
@pytest.mark.asyncio
async def test_command_line_http_and_worker_cause_the_same_events(
    tmp_path: Path, pickup: str
) -> None:
    caused: list[list[tuple[str, bytes, str]]] = []
    for way in ("command line", "http", "worker"):
        url = f"sqlite+aiosqlite:///{tmp_path / way.replace(' ', '-')}.db"
        async with inline(url, hailing_service) as (app, sessions):
            if way == "command line":
                asked = ["ann", pickup, "--ride", "r1"]
                assert len(await command_line(asked, sessions, Listeners())) == 1
            elif way == "http":
                transport = httpx.ASGITransport(http(sessions, Listeners()))
                body = {"ride": "r1", "passenger": "ann", "pickup": pickup}
                async with httpx.AsyncClient(transport=transport, base_url="http://hail") as client:
                    answer = await client.post("/rides", json=body)
                    assert answer.status_code == (202 if pickup == "Mission" else 422)
                    assert (await client.post("/rides", json=body)).status_code == 409
            else:
                await app.send(RequestRide("r1", "ann", pickup))
                await app.run()
            engine = sessions.kw["bind"]
            caused.append(
                [
                    (one.type, one.body, one.subject)
                    for one in await stored(engine)
                    if one.type.startswith("rides.")
                ]
            )
    assert len(caused[0]) == 1
    assert caused[0] == caused[1] == caused[2]


# --- the demo ------------------------------------------------------------------------------------

EXPECTED = """\
Hailing (each answered at once):
  ann: looking for a driver
  bob: looking for a driver
  cid: we do not serve Alcatraz
Analytics: {'RideHailed': 2, 'CouldNotHail': 1}
Told later, once each:
  ann: Doc Brown is on the way
  bob: sorry, nobody drives
Saga of ann: told (completed)
Saga of bob: told (completed)
"""


@pytest.mark.asyncio
async def test_the_demo_prints_what_its_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    await demo.main()
    assert capsys.readouterr().out == EXPECTED
