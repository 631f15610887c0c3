"""Deletes what is older than its retention, a little at a time."""

from __future__ import annotations

import logging
import random

import anyio

from sagacity.core.errors import StoreError
from sagacity.ports import Retention, RetentionStore

log = logging.getLogger(__name__)


class Janitor:
    """Keeps inbox, outbox, history, finished instances and dead letters from growing for ever."""

    def __init__(self, store: RetentionStore, retention: Retention, *, limit: int = 500) -> None:
        self.store, self.retention, self.limit = store, retention, limit
        self._stop = anyio.Event()

    def stop(self) -> None:
        """Lets `run` return."""
        self._stop.set()

    async def clean(self) -> int:
        """One round of small deletes until nothing is left to delete; returns how many rows went."""
        total = 0
        while not self._stop.is_set():
            gone = await self.store.clean(self.retention, self.limit)
            total += gone
            if gone < self.limit:
                break
        return total

    async def run(self, interval_s: float = 60.0) -> None:
        """Cleans until `stop`, at an interval that differs by up to a fifth each time."""
        while not self._stop.is_set():
            with anyio.move_on_after(interval_s * random.uniform(0.8, 1.2)):
                await self._stop.wait()
                return
            try:
                gone = await self.clean()
            except StoreError as error:
                log.warning("Cleaning failed, tried again later", extra={"error": str(error)})
            else:
                if gone:
                    log.info("Old rows were deleted", extra={"rows": gone})
