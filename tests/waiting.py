"""Waiting for what another process or task does, by a condition and a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import psutil

_POLL_SECONDS = 0.01


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Return once `condition()` holds; fail, naming `what`, if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(_POLL_SECONDS)


async def async_eventually(
    condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 20.0
) -> None:
    """The same for a condition that has to be awaited, without blocking the event loop."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        await asyncio.sleep(_POLL_SECONDS)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its burial (a zombie) does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
