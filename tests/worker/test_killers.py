"""Messages that end the process which works on them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import anyio
import pytest

from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.worker.config import Settings
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually
from tests.worker.killer import ATTEMPTS_MAX, Crash, Dropped, service
from tests.worker.running import QUICK, envelope, site

pytestmark = pytest.mark.asyncio


@pytest.mark.slow
async def test_a_handler_that_ends_the_process_becomes_a_dead_letter(
    store_url: str, redis_url: str
) -> None:
    """SIGKILL in each attempt: as many processes die as there are attempts, then nobody else."""
    async with site(store_url, redis_url) as place:
        await place.publish(Crash("c1"), ids=["c1"])
        attempts: list[str] = []
        status = -signal.SIGKILL
        for _ in range(ATTEMPTS_MAX + 1):
            process = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "tests.worker.killer", store_url, redis_url],
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
            attempts += process.stdout.splitlines()
            status = process.returncode
            if status != -signal.SIGKILL:
                break
        assert attempts == [f"attempt {n}" for n in range(1, ATTEMPTS_MAX + 1)]
        assert status == 0
        [letter] = await place.store.dead_letters()
        assert (letter.row.message_id, letter.row.reason) == ("c1", "failed")
        assert letter.row.attempts == ATTEMPTS_MAX
        assert "the process that worked on it ended" in letter.row.error


@pytest.mark.slow
async def test_what_comes_with_a_message_that_kills_is_handled(
    sqlite_url: str, redis_url: str
) -> None:
    """A saga's handler ends the process each time: its message alone becomes a dead letter."""
    healthy = 12
    async with site(sqlite_url, redis_url) as place:
        dropped = [Dropped(f"g{n}", kills=n == 3) for n in range(healthy + 1)]
        await place.publish(*dropped, ids=[f"m{n}" for n in range(healthy + 1)])
        command = [sys.executable, "-m", "tests.worker.killer", sqlite_url, redis_url, str(healthy)]
        status, lives = -signal.SIGKILL, 0
        while status == -signal.SIGKILL and lives < 10:
            process = await asyncio.to_thread(subprocess.run, command, timeout=60, check=False)
            status, lives = process.returncode, lives + 1
        assert status == 0
        assert lives > 2, "it died more than once"
        [letter] = await place.store.dead_letters()
        assert (letter.row.message_id, letter.row.reason) == ("m3", "killer")
        assert (await place.store.counts())["sagas.completed"] == healthy


async def test_what_was_handed_out_often_and_never_tried_is_no_killer() -> None:
    """Five consumers came and went before they began, say because their store was away."""
    store, bus = MemoryStore(), MemoryBus()
    await store.prepare(create=True)
    await bus.publish([envelope(Dropped(f"g{n}")) for n in range(5)])
    for life in range(6):
        gone = await bus.join("crashes", f"gone{life}", service.topics)
        assert len(await (gone.reclaim(0, 10) if life else gone.read(10, 100))) == 5
    settings = Settings(store="memory:", bus="memory:", **QUICK)
    worker = Worker(service, store, bus, settings, consumer="w")

    async def broken() -> bool:
        counts = await store.counts()
        return counts["sagas.completed"] + counts["dead_letters"] == 5

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await async_eventually(broken, "all are handled")
            worker.stop()
    assert await store.dead_letters() == []
