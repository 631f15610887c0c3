"""``--reload``: one worker process that is started anew whenever a Python file changes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sagacity.cli.child import Child
from sagacity.cli.exits import Exit
from sagacity.core.errors import ConfigurationError
from sagacity.worker.config import Settings

__all__ = ["Reloader", "check_watcher"]

log = logging.getLogger(__name__)

_PATIENCE_S: Final = 5.0
"""How long the old process may drain before it is told to stop at once."""


def check_watcher() -> None:
    """Raises ConfigurationError where the library that watches files is missing."""
    if importlib.util.find_spec("watchfiles") is None:
        raise ConfigurationError(
            "--reload needs watchfiles, which is not installed; run: pip install 'sagacity[reload]'"
        )


class Reloader:
    """Runs one child and replaces it when a ``.py`` file under `directory` changes."""

    def __init__(
        self,
        arguments: Sequence[str],
        settings: Settings,
        directory: str,
        orders: dict[str, Any],
    ) -> None:
        check_watcher()
        self._arguments, self._settings, self._orders = tuple(arguments), settings, dict(orders)
        self._directory = Path(directory).resolve()
        self._stopping = asyncio.Event()
        self._signals = 0
        self._child: Child | None = None

    async def run(self) -> Exit:
        """Works until SIGTERM or SIGINT. A child that fails waits for the next change."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        changed = asyncio.Event()
        watching = asyncio.create_task(self._watch(changed), name="file watcher")
        try:
            while not self._stopping.is_set():
                changed.clear()
                status = await self._run_child(changed)
                if self._stopping.is_set():
                    return Exit(status) if status in set(Exit) else Exit.CUT_SHORT
                if not changed.is_set():
                    log.warning("Worker ended, waiting for a change", extra={"status": status})
                    await _first(changed, self._stopping)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        return Exit.DONE

    async def _run_child(self, changed: asyncio.Event) -> int:
        self._child = child = await Child.start(self._arguments, self._settings, self._orders)
        self._orders.update(first=False, banner=False)
        if self._stopping.is_set():
            child.signal(signal.SIGTERM)
        ended = asyncio.create_task(child.wait())
        turned = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait({ended, turned}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and not self._stopping.is_set():
                child.signal(signal.SIGTERM)
                _, late = await asyncio.wait({ended}, timeout=_PATIENCE_S)
                if late:
                    child.signal(signal.SIGTERM)
            return await ended
        finally:
            turned.cancel()
            self._child = None

    def _on_signal(self) -> None:
        self._signals += 1
        self._stopping.set()
        if self._child is not None:
            self._child.signal(signal.SIGTERM)

    async def _watch(self, changed: asyncio.Event) -> None:
        import watchfiles

        log.info("Watching for changes", extra={"directory": str(self._directory)})
        async for changes in watchfiles.awatch(
            self._directory, watch_filter=watchfiles.PythonFilter()
        ):
            paths = sorted(str(path) for _, path in changes)
            log.info("File changed, starting anew", extra={"file": paths[0], "files": len(paths)})
            changed.set()


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
