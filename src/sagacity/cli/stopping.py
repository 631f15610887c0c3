"""How a worker process is asked to stop, once politely and once for good.

The first SIGTERM, SIGINT or SIGHUP drains: nothing new is read, what has begun is committed and acknowledged.
The second one stops at once, and so does the shutdown time-out. None of this depends on the event
loop: user code may block it, so a thread has the last word. Nothing is lost either way, since what
was not acknowledged is delivered again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final, Protocol

import anyio

from sagacity.cli.exits import Exit

__all__ = ["Stoppable", "Stopping"]

log = logging.getLogger(__name__)

GRACE_S: Final = 3.0
"""How long a worker may take to end after it was told to stop at once."""


class Stoppable(Protocol):
    """What can be stopped in two ways; both are called from the event loop."""

    def stop(self) -> None:
        """Drain."""
        ...

    def kill(self) -> None:
        """End now."""
        ...


class Stopping:
    """The stop requests of this process, from signals and from a parent process.

    Make it and call `install` in the main thread before the event loop runs, then `attach` a worker
    from inside the loop.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: Stoppable | None = None
        self._requested: anyio.Event | None = None
        self._requests = 0
        self.cut_short = False
        """True once the process was to stop at once."""

    @property
    def asked(self) -> bool:
        """True once a stop was asked for."""
        return self._requests > 0

    @property
    def requested(self) -> anyio.Event:
        """Set once a stop was asked for; for code inside the event loop."""
        assert self._requested is not None, "enter the loop first"
        return self._requested

    def install(self) -> None:
        """Takes over SIGTERM, SIGINT and SIGHUP, unless they are ignored.

        These are plain handlers, so they work while user code keeps the event loop busy.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, self._on_signal)

    def enter_loop(self) -> None:
        """Names the running event loop as the one to tell."""
        self._loop = asyncio.get_running_loop()
        self._requested = anyio.Event()

    def attach(self, worker: Stoppable) -> None:
        """Names the worker to stop."""
        self._worker = worker

    def request(self, why: str) -> None:
        """Asks for a stop, as a signal would."""
        if self._loop is None:
            raise SystemExit(Exit.DONE)  # nothing has begun yet
        self._requests += 1
        if self._requests == 1:
            self._end_after(self._timeout_s, self._expired)
            self._tell(self._drain, why)
        elif not self.cut_short:
            self._cut_short(why)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def _tell(self, callback: Callable[[str], None], why: str) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            # Logging waits for the loop too: a signal may have come in the middle of a log call.
            self._loop.call_soon_threadsafe(callback, why)

    def _drain(self, why: str) -> None:
        log.info(
            "Stopping, finishing what has begun", extra={"why": why, "limit_s": self._timeout_s}
        )
        self.requested.set()
        if self._worker is not None:
            self._worker.stop()

    def _expired(self) -> None:
        if not self.cut_short:
            self._cut_short("shutdown time-out")

    def _cut_short(self, why: str) -> None:
        self.cut_short = True
        self._end_after(GRACE_S, _exit_now)
        self._tell(self._kill, why)

    def _kill(self, why: str) -> None:
        log.warning("Stopping at once", extra={"why": why})
        self.requested.set()
        if self._worker is not None:
            self._worker.kill()

    def _end_after(self, seconds: float, callback: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, callback)
        timer.daemon = True
        timer.start()


def _exit_now() -> None:
    log.error("Ended without cleaning up", extra={"why": "the worker did not stop"})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(Exit.CUT_SHORT)
