"""Sagas that send numbered commands, a worker for them, and a checker of their order.

    python -m tests.worker.lanes STORE_URL BUS_URL CONSUMER

Works until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sagacity import Command, Event, Saga, Service, State, on
from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.core.delivery import Envelope
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.worker.running import QUICK


class Begin(Event, topic="ticks"):
    ref: str


class Tick(Event, topic="ticks"):
    ref: str


class End(Event, topic="ticks"):
    ref: str


class Step(Command, topic="steps"):
    ref: str
    number: int


class Lane(Saga, key="ref"):
    ticking = State()
    ended = State(final=True)

    ref: str
    sent: int = 0

    @on(Begin, starts=True, goto=ticking)
    def begin(self, event: Begin) -> None: ...

    @on(Tick, when=ticking)
    def tick(self, event: Tick) -> None:
        for _ in range(2):
            self.sent += 1
            self.send(Step(event.ref, self.sent))

    @on(End, when=ticking, goto=ended)
    def end(self, event: End) -> None: ...


service = Service("lanes", sagas=[Lane])


def out_of_order(published: Iterable[Envelope]) -> list[str]:
    """Lanes whose commands did not come in order, by the first occurrence of each (G5)."""
    seen: set[str] = set()
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for envelope in published:
        if envelope.id not in seen:
            seen.add(envelope.id)
            numbers[envelope.saga_key].append(envelope.sequence)
    return [key for key, found in numbers.items() if found != list(range(1, len(found) + 1))]


async def main(store_url: str, bus_url: str, consumer: str) -> None:
    """Runs a worker whose relay takes every row at once, beside the worker itself."""
    store, bus = SqlStore(store_url), RedisBus(bus_url)
    changed: dict[str, Any] = {
        **QUICK,
        "pending_age_ms": 1,
        "sweep_interval_ms": 10,
        "batch_max": 20,
    }
    worker = Worker(
        service, store, bus, Settings(store=store_url, bus=bus_url, **changed), consumer=consumer
    )
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), worker.stop)
    await worker.run()
    loop.remove_reader(sys.stdin.fileno())
    await store.close()
    await bus.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
