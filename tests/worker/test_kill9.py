"""A process that dies at any moment leaves all of a step or nothing of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text

from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.worker.cycle import Cycle
from sagacity.worker.relay import Relay
from tests.worker.kill9 import delivery, service

RUNS = {"sqlite": 700, "postgresql": 300}
"""A thousand in all."""
pytestmark = pytest.mark.timeout(600)


def sweep(mode: str, store_url: str, runs: int, bus_url: str = "") -> dict[str, int]:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.worker.kill9", mode, store_url, str(runs), bus_url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, int] = json.loads(finished.stdout.strip().splitlines()[-1])
    # The sweep went through the whole step at least once, and nearly every run was a kill.
    assert result["survived"] >= 1
    assert result["killed"] > runs * 0.8
    return result


def column(store_url: str, query: str) -> list[Any]:
    async def run() -> list[Any]:
        store = SqlStore(store_url)
        async with store.engine.connect() as connection:
            rows = (await connection.execute(text(query))).scalars().all()
        await store.close()
        return list(rows)

    return asyncio.run(run())


def names(values: list[Any]) -> list[str]:
    return [bytes(value).decode() for value in values]


@pytest.fixture(params=["sqlite", "asyncpg"])
def killed_store_url(request: pytest.FixtureRequest) -> str:
    """Two drivers are enough: what is killed is the process, not the driver."""
    fixture = {"sqlite": "sqlite_url", "asyncpg": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.mark.server
@pytest.mark.requirement("R29")
def test_an_entity_and_its_events_are_one_write(killed_store_url: str) -> None:
    """kill -9 at every turn between begin and commit, 1000 runs in all: the row and both events, or nothing."""
    runs = RUNS[killed_store_url.partition("+")[0]]
    sweep("entity", killed_store_url, runs)
    rows = set(column(killed_store_url, "SELECT ref FROM kill9_row"))
    bodies = [
        json.loads(body)["ref"]
        for body in names(column(killed_store_url, "SELECT body FROM sagacity_outbox"))
    ]
    events = Counter(bodies)
    assert set(events) == rows
    assert set(events.values()) == {2}
    assert 0 < len(rows) < runs


@pytest.mark.server
@pytest.mark.requirement("R37")
def test_saga_state_and_pending_commands_are_one_write(killed_store_url: str) -> None:
    """kill -9 at every turn of a saga's step, 1000 runs in all: state, commands and inbox, or nothing.

    Afterwards every message is run again: each instance exists once, with each command once.
    """
    runs = RUNS[killed_store_url.partition("+")[0]]
    sweep("saga", killed_store_url, runs)

    def seen() -> tuple[set[str], Counter[str], set[str]]:
        keys = set(names(column(killed_store_url, "SELECT saga_key FROM sagacity_saga")))
        bodies = names(column(killed_store_url, "SELECT body FROM sagacity_outbox"))
        commands = Counter(json.loads(body)["ref"] for body in bodies)
        inbox = names(column(killed_store_url, "SELECT message_id FROM sagacity_inbox"))
        return keys, commands, {name.removeprefix("m-") for name in inbox}

    keys, commands, inbox = seen()
    assert set(commands) == keys == inbox
    assert set(commands.values()) == {2}
    assert 0 < len(keys) < runs

    async def again() -> None:
        store = SqlStore(killed_store_url)
        cycle = Cycle(service, service.catalog(), store, RedisBus("redis://127.0.0.1:1"))
        for start in range(0, runs, 100):
            await cycle.settle([delivery(f"k{n}") for n in range(start, start + 100)])
        await store.close()

    asyncio.run(again())
    keys, commands, inbox = seen()
    assert keys == inbox == {f"k{n}" for n in range(runs)}
    assert set(commands.values()) == {2}


@pytest.mark.requirement("R30", "R33")
def test_what_was_committed_leaves_after_a_crash(killed_store_url: str, redis_url: str) -> None:
    """kill -9 at every turn after the commit: after a restart every command is on its stream.

    Some are there twice, under one id; none is missing.
    """
    runs = 150
    sweep("publish", killed_store_url, runs, redis_url)

    async def restart() -> Counter[str]:
        store, bus = SqlStore(killed_store_url), RedisBus(redis_url)
        relay = Relay(store, bus, store.clock, age_us=0)
        while await relay.sweep():
            pass
        reader = await bus.join("check", "check", ["shipping", "billing"])
        seen: Counter[str] = Counter()
        while entries := await reader.read(500, 0):
            seen.update(e.envelope.id for e in entries if e.envelope is not None)
            await reader.ack(entries)
        await reader.close()
        await store.close()
        await bus.close()
        return seen

    seen = asyncio.run(restart())
    committed = names(column(killed_store_url, "SELECT message_id FROM sagacity_outbox"))
    assert set(seen) == set(committed)
    assert len(committed) == 2 * runs
    assert max(seen.values()) >= 2
