"""A worker whose handlers end the process.

    python -m tests.worker.killer STORE_URL BUS_URL [INSTANCES]

Ends by SIGKILL as long as a message that kills is handed to its handler; else once there is a dead
letter, and as many saga instances.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from sagacity import Command, Context, Event, Saga, Service, State, handles, on
from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually
from tests.worker.running import QUICK

ATTEMPTS_MAX = 3


class Crash(Command, topic="crashes"):
    ref: str


@handles(Crash)
async def crash(command: Crash, context: Context) -> None:
    print(f"attempt {context.attempt}", flush=True)  # noqa: T201
    os.kill(os.getpid(), signal.SIGKILL)


class Dropped(Event, topic="drops"):
    ref: str
    kills: bool = False


class Glass(Saga, key="ref"):
    broken = State(final=True)

    ref: str

    @on(Dropped, starts=True, goto=broken)
    def drop(self, event: Dropped) -> None:
        if event.kills:
            os.kill(os.getpid(), signal.SIGKILL)


service = Service("crashes", sagas=[Glass], handlers=[crash])


async def main(store_url: str, bus_url: str, instances: str = "0") -> None:
    """Runs until the killer is a dead letter."""
    store, bus = SqlStore(store_url), RedisBus(bus_url)
    changed: dict[str, Any] = {**QUICK, "lease_s": 1.0, "attempts_max": ATTEMPTS_MAX}
    settings = Settings(store=store_url, bus=bus_url, **changed)
    worker = Worker(service, store, bus, settings, consumer="killed")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run())

        async def buried() -> bool:
            counts = await store.counts()
            return counts["dead_letters"] > 0 and counts["sagas.completed"] >= int(instances)

        await async_eventually(buried, "the killer is a dead letter")
        worker.stop()
    await store.close()
    await bus.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
