"""Kills a process with SIGKILL at every turn of its event loop, one turn later each time.

    python -m tests.worker.kill9 MODE STORE_URL RUNS [BUS_URL]

Each run is a forked child that does one step for one key and dies at loop turn number n; when a
child survives, its step is over and n starts again at the first turn. Prints one JSON line: how many
runs were killed, and how many turns a step takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sagacity import Command, Event, RecordsEvents, Saga, Service, State, on
from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.session import session_factory
from sagacity.core.delivery import Delivery
from sagacity.worker.cycle import Cycle
from tests.worker.running import envelope


class Placed(Event, topic="orders"):
    ref: str


class Paid(Event, topic="orders"):
    ref: str


class Ship(Command, topic="shipping"):
    ref: str


class Bill(Command, topic="billing"):
    ref: str


class Order(Saga, key="ref"):
    waiting = State()
    paid = State(final=True)

    ref: str

    @on(Placed, starts=True, goto=waiting)
    def place(self, event: Placed) -> None:
        self.send(Ship(event.ref))
        self.send(Bill(event.ref))

    @on(Paid, when=waiting, goto=paid)
    def pay(self, event: Paid) -> None: ...


service = Service("kill9", sagas=[Order])


class Model(DeclarativeBase):
    pass


class Row(RecordsEvents, Model):
    __tablename__ = "kill9_row"
    ref: Mapped[str] = mapped_column(primary_key=True)


Step = Callable[[str, Callable[[], None]], Awaitable[None]]


def entity_step(store_url: str, bus_url: str) -> Step:
    """R29: an entity and the events it records, from before the flush to after the commit."""

    async def step(ref: str, arm: Callable[[], None]) -> None:
        store = SqlStore(store_url)
        await store.prepare()
        sessions = session_factory(store)
        async with sessions() as session:
            await session.connection()
            arm()
            row = Row(ref=ref)
            row.record(Placed(ref))
            row.record(Paid(ref))
            session.add(row)
            await session.commit()

    return step


def saga_step(store_url: str, bus_url: str) -> Step:
    """R37: one message of a saga: its state, its commands and its inbox row."""

    async def step(ref: str, arm: Callable[[], None]) -> None:
        store = SqlStore(store_url)
        await store.prepare()
        cycle = Cycle(service, service.catalog(), store, RedisBus("redis://127.0.0.1:1"))
        arm()
        await cycle.settle([delivery(ref)])

    return step


def publish_step(store_url: str, bus_url: str) -> Step:
    """R30: from the commit to the mark that the commands have left."""

    async def step(ref: str, arm: Callable[[], None]) -> None:
        store, bus = SqlStore(store_url), RedisBus(bus_url)
        await store.prepare()
        await bus.check()
        cycle = Cycle(service, service.catalog(), store, bus)
        settled = await cycle.settle([delivery(ref)])
        arm()
        await cycle.publish(settled.pending)
        await store.published(cycle.published)

    return step


def delivery(ref: str) -> Delivery:
    return Delivery(topic="orders", entry_id="1-1", envelope=envelope(Placed(ref), f"m-{ref}"))


def child(step: Step, ref: str, turns: int) -> None:
    """Runs the step and dies at the given turn of the loop after `arm` was called."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    left = [-1]
    run_once: Callable[[], None] = loop._run_once  # type: ignore[attr-defined]

    def counted() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        run_once()

    loop._run_once = counted  # type: ignore[attr-defined]

    def arm() -> None:
        left[0] = turns

    loop.run_until_complete(step(ref, arm))
    os._exit(0)


STEPS: dict[str, Callable[[str, str], Step]] = {
    "entity": entity_step,
    "saga": saga_step,
    "publish": publish_step,
}


async def create(store_url: str) -> None:
    store = SqlStore(store_url)
    await store.prepare(create=True)
    async with store.engine.begin() as connection:
        await connection.run_sync(Model.metadata.create_all)
    await store.close()


def main(mode: str, store_url: str, runs: int, bus_url: str = "") -> dict[str, Any]:
    asyncio.run(create(store_url))
    step = STEPS[mode](store_url, bus_url)
    killed = survived = turns = longest = 0
    for run in range(runs):
        pid = os.fork()
        if pid == 0:
            try:
                child(step, f"k{run}", turns)
            finally:
                os._exit(3)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            killed += 1
            turns += 1
            longest = max(longest, turns)
        else:
            assert os.WEXITSTATUS(status) == 0, f"run {run} failed by itself"
            survived += 1
            turns = 0
    return {"killed": killed, "survived": survived, "turns": longest}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])))  # noqa: T201
