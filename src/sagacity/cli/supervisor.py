"""``--workers N``: a parent that keeps N worker processes running.

A child that crashes is started again, at once if it had worked for a while, and with growing pauses
if it had not. One whose configuration or schema is wrong would fail again, so the parent stops the
others and ends with that child's exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from sagacity.cli.child import Child
from sagacity.cli.exits import Exit
from sagacity.cli.stopping import GRACE_S
from sagacity.worker.config import Settings
from sagacity.worker.health import HealthServer

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

STEADY_S: Final = 30.0
"""A child that lived this long has started well."""
FAILED_STARTS_MAX: Final = 5
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_HOPELESS: Final = frozenset({int(Exit.WRONG), int(Exit.SCHEMA)})


class Supervisor:
    """Keeps `workers` children running until it is told to stop."""

    def __init__(
        self, arguments: Sequence[str], settings: Settings, workers: int, orders: dict[str, Any]
    ) -> None:
        self._arguments, self._workers, self._orders = tuple(arguments), workers, orders
        # The parent answers for all; two children could not listen on one port.
        self._settings = msgspec.structs.replace(settings, health="")
        self._health = settings.health_address
        self._children: dict[int, Child] = {}
        self._stopping = asyncio.Event()
        self._signals = 0
        self._status = Exit.DONE

    async def run(self) -> Exit:
        """Works until SIGTERM or SIGINT, or until a child shows that going on is hopeless."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if self._health is not None:
                    await stack.enter_async_context(HealthServer(*self._health, self))
                async with asyncio.TaskGroup() as group:
                    for index in range(self._workers):
                        group.create_task(self._keep(index), name=f"worker {index}")
                    group.create_task(self._limit(), name="shutdown limit").add_done_callback(
                        lambda task: task.cancelled() or task.exception()
                    )
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        log.info("All workers stopped", extra={"status": int(self._status)})
        return self._status

    def alive(self) -> tuple[bool, dict[str, object]]:
        """True where every child runs and makes progress."""
        good = len(self._children) == self._workers and all(
            child.alive for child in self._children.values()
        )
        return good, {"workers": self._workers, "running": len(self._children)}

    def ready(self) -> tuple[bool, dict[str, object]]:
        """True where at least one child can take work."""
        figures = {str(index): child.figures() for index, child in sorted(self._children.items())}
        good = any(child.ready for child in self._children.values())
        return good and not self._stopping.is_set(), {"workers": figures}

    # --- one child

    async def _keep(self, index: int) -> None:
        failed_starts = 0
        first = index == 0
        orders = {
            **self._orders,
            "first": first,
            "banner": first and self._orders.get("banner", False),
        }
        while not self._stopping.is_set():
            child = await Child.start(self._arguments, self._settings_of(index), orders)
            orders.update(first=False, banner=False)
            self._children[index] = child
            if self._stopping.is_set():  # asked while it was being started
                child.signal(signal.SIGTERM)
            log.info("Worker started", extra={"worker": index, "worker_pid": child.pid})
            status = await child.wait()
            del self._children[index]
            if self._stopping.is_set():
                self._note_end(status)
                return
            if status in _HOPELESS:
                log.error("Worker cannot start", extra={"worker": index, "status": status})
                self._give_up(Exit(status))
                return
            well = child.was_ready or child.age_s > STEADY_S
            failed_starts = 0 if well else failed_starts + 1
            if failed_starts >= FAILED_STARTS_MAX:
                log.error("Worker fails at every start", extra={"worker": index, "status": status})
                self._give_up(Exit.FAILED)
                return
            longest = min(_FIRST_PAUSE_S * 2**failed_starts, _LONGEST_PAUSE_S)
            pause = 0.0 if well and status == Exit.DONE else random.uniform(longest / 2, longest)
            log.warning(
                "Worker ended, starting another",
                extra={
                    "worker": index,
                    "worker_pid": child.pid,
                    "ended_by": _ended_by(status),
                    "pause_s": pause,
                },
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    def _settings_of(self, index: int) -> Settings:
        if not self._settings.consumer:
            return self._settings
        return msgspec.structs.replace(
            self._settings, consumer=f"{self._settings.consumer}-{index}"
        )

    def _note_end(self, status: int) -> None:
        # One that the signal ended outright had not begun anything.
        if status not in {Exit.DONE, -signal.SIGTERM} and self._status is Exit.DONE:
            self._status = Exit(status) if status in set(Exit) else Exit.CUT_SHORT

    # --- the end

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            log.info("Stopping all workers", extra={"why": number.name})
            self._stop()
        else:
            log.warning("Stopping all workers at once", extra={"why": number.name})
            self._tell(signal.SIGTERM)

    def _give_up(self, status: Exit) -> None:
        self._status = status
        self._stop()

    def _stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            self._tell(signal.SIGTERM)

    def _tell(self, number: signal.Signals) -> None:
        for child in self._children.values():
            child.signal(number)

    async def _limit(self) -> None:
        """Kills what has not ended well after its own limit."""
        await self._stopping.wait()
        limit = self._settings.shutdown_timeout_s + 2 * GRACE_S
        end = asyncio.get_running_loop().time() + limit
        while self._children:
            if asyncio.get_running_loop().time() > end:
                log.error("Workers did not stop, killing them", extra={"limit_s": limit})
                self._tell(signal.SIGKILL)
                return
            await asyncio.sleep(0.02)


def _ended_by(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
