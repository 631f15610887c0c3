"""Deletes what is older than its retention, a little at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection

import anyio

from sagacity.core.errors import BusError, StoreError
from sagacity.ports import BusUpkeep, Retention, RetentionStore

log = logging.getLogger(__name__)


CONSUMER_IDLE_US = 86_400_000_000
"""A consumer without pending entries is forgotten after a day."""


class Janitor:
    """Keeps inbox, outbox, history, finished instances, dead letters and streams from growing for ever.

    `topics` are the streams the service `group` reads; of them goes what every group acknowledged
    and what is older than `stream_us` microseconds.
    """

    def __init__(
        self,
        store: RetentionStore,
        retention: Retention,
        *,
        limit: int = 500,
        bus: BusUpkeep | None = None,
        group: str = "",
        topics: Collection[str] = (),
        stream_us: int = 86_400_000_000,
    ) -> None:
        self.store, self.retention, self.limit = store, retention, limit
        self.bus, self.group, self.topics, self.stream_us = bus, group, topics, stream_us
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

    async def trim(self) -> int:
        """Trims the streams and forgets consumers that are gone; returns how many entries went."""
        if self.bus is None:
            return 0
        gone = await self.bus.trim(self.topics, self.stream_us)
        await self.bus.forget_consumers(self.group, self.topics, CONSUMER_IDLE_US)
        return gone

    async def run(self, interval_s: float = 60.0) -> None:
        """Cleans until `stop`, at an interval that differs by up to a fifth each time."""
        while not self._stop.is_set():
            with anyio.move_on_after(interval_s * random.uniform(0.8, 1.2)):
                await self._stop.wait()
                return
            try:
                gone, trimmed = await self.clean(), await self.trim()
            except (StoreError, BusError) as error:
                log.warning("Cleaning failed, tried again later", extra={"error": str(error)})
            else:
                if gone or trimmed:
                    log.info("Old rows were deleted", extra={"rows": gone, "entries": trimmed})
