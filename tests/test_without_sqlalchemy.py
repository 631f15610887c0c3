"""The core, recording, listeners and the memory backends work where SQLAlchemy is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sqlalchemy", "greenlet", "aiosqlite", "asyncpg", "psycopg"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

SAGA = """
import asyncio
from sagacity import Command, Event, RecordsEvents, Saga, Service, State, handles, on
from sagacity.testing.inline import Inline

class Placed(Event, topic="orders"):
    ref: str

class Ship(Command, topic="shipping"):
    ref: str

class Shipped(Event, topic="shipped"):
    ref: str

class Shipping(Saga, key="ref"):
    waiting = State()
    shipped = State(final=True)
    ref: str

    @on(Placed, starts=True, goto=waiting)
    def ship(self, event: Placed) -> None:
        self.send(Ship(event.ref))

    @on(Shipped, when=waiting, goto=shipped)
    def done(self, event: Shipped) -> None:
        pass

@handles(Ship)
async def ship(command: Ship) -> Shipped:
    return Shipped(command.ref)

class Order(RecordsEvents):
    pass

async def main() -> None:
    order = Order()
    order.record(Placed("o1"))
    async with Inline(Service("shop", sagas=[Shipping], handlers=[ship])) as app:
        for item in order.drain_events():
            await app.publish(item.event)
        await app.run()
        print((await app.saga(Shipping, "o1")).state)

asyncio.run(main())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=100,
    )


@pytest.mark.requirement("R27")
def test_a_saga_runs_in_memory() -> None:
    done = run(SAGA)
    assert done.stdout == "shipped\n", done.stderr


@pytest.mark.requirement("R27")
def test_the_tests_of_recording_and_listeners_pass() -> None:
    arguments = [
        "tests/test_recording.py",
        "tests/test_listeners.py",
        "--noconftest",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = run(f"import pytest; raise SystemExit(pytest.main({arguments!r}))")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.requirement("R27")
def test_sqlalchemy_is_really_out_of_reach_there() -> None:
    done = run("import sagacity.backends.sql.session")
    assert done.returncode != 0
    assert "No module named 'sqlalchemy'" in done.stderr
