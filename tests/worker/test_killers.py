"""Messages that end the process which works on them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from tests.worker.killer import ATTEMPTS_MAX, Crash
from tests.worker.running import site

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
