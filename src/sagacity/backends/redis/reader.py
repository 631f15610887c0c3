"""One connection that reads some streams of a consumer group, one command at a time.

A read in flight is never cancelled: what Redis hands out while nobody listens is lost to the caller
until it is reclaimed (protocol.md M1). So a command runs in a task of its own that outlives the call
that asked for it, and the next call collects its result.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Collection, Sequence

import redis.exceptions as failures

from sagacity.backends.redis.connection import (
    Client,
    Connector,
    close_client,
    missing_group,
    reason_of,
)
from sagacity.backends.redis.entry import (
    Entry,
    attempts_of,
    delivery_of,
    streams_of,
)
from sagacity.core.delivery import Delivery

_log = logging.getLogger(__name__)

BLOCK_MS_MAX = 1000
"""Longest single blocking read: bounds how late a deleted stream or a half-open connection shows."""

READ_BYTES_MAX = 16 * 1024 * 1024
"""About the most that one reply may hold, judged by the entries seen before (protocol.md row 23)."""


class Membership:
    """A consumer in a group, and the streams it reads."""

    def __init__(
        self, *, group: str, consumer: str, keys: dict[str, str], entry_bytes_max: int
    ) -> None:
        self.group, self.consumer, self.keys = group, consumer, keys
        self.topics = {key.encode(): topic for topic, key in keys.items()}
        self.entry_bytes_max = entry_bytes_max

    async def found(self, client: Client, topics: Collection[str]) -> None:
        """Makes sure that the group exists on each stream, from the first entry that is kept.

        Never "from now": what was published before the group existed, or while it was gone, would
        be skipped (protocol.md row 10).
        """
        for topic in topics:
            try:
                await client.execute_command(
                    "XGROUP CREATE", self.keys[topic], self.group, "0", "MKSTREAM"
                )
            except failures.ResponseError as error:
                if not reason_of(error).startswith("BUSYGROUP"):
                    raise


class Reader:
    """Reads `topics` over a connection of its own."""

    def __init__(
        self, connector: Connector, membership: Membership, topics: Collection[str]
    ) -> None:
        self._connector = connector
        self._membership = membership
        self._topics = tuple(topics)
        self._client = connector.dedicated(BLOCK_MS_MAX)
        self._task: asyncio.Task[list[Delivery]] | None = None
        self._backlog: dict[str, str] = dict.fromkeys(self._topics, "0")
        """Topic -> last own pending entry that was read again; empty once all of them were."""
        self._busy = 1
        """How many streams had entries in the last reply: COUNT is per stream, a limit is not."""
        self._entry_bytes = membership.entry_bytes_max / 4
        """Moving estimate of an entry's size; careful before the first entries came."""
        self._down = False
        self._client_id: int | None = None

    # --- the command in flight ------------------------------------------------------------------

    @property
    def task(self) -> asyncio.Task[list[Delivery]] | None:
        """The command in flight."""
        return self._task

    def start(self, limit: int, block_ms: int) -> None:
        """Puts a command in flight; with `block_ms` 0 it does not wait for entries."""
        assert self._task is None
        # An empty context: the task outlives its caller, whose trace is not the parent of its work.
        self._task = asyncio.create_task(
            self._read(limit, min(block_ms, BLOCK_MS_MAX)),
            name=f"redis reader {self._membership.group}",
            context=contextvars.Context(),
        )

    def collect(self) -> list[Delivery]:
        """The result of a command that is done. Raises BusUnavailable or BusError if it failed."""
        assert self._task is not None
        task, self._task = self._task, None
        return task.result()

    async def stop(self, shared: Client, wait_s: float) -> list[Delivery]:
        """Ends the command in flight without losing its result, and closes the connection."""
        rest: list[Delivery] = []
        if self._task is not None:
            await self._unblock(shared)  # otherwise it ends within one slice all the same
            await asyncio.wait({self._task}, timeout=wait_s)
            if not self._task.done():
                self._task.cancel()  # the server is silent; what it hands out is reclaimed later
                await asyncio.wait({self._task})
            if not self._task.cancelled() and self._task.exception() is None:
                rest = self._task.result()
            self._task = None
        await close_client(self._client)
        return rest

    async def _unblock(self, shared: Client) -> None:
        if not self._client_id:
            return
        try:
            at = self._connector.at(shared, self._membership.keys[self._topics[0]])
            await shared.execute_command("CLIENT UNBLOCK", self._client_id, **at)
        except (failures.RedisError, OSError) as error:
            _log.debug("Blocked read was not ended early", extra={"error": reason_of(error)})

    # --- reading --------------------------------------------------------------------------------

    async def _read(self, limit: int, block_ms: int) -> list[Delivery]:
        try:
            found = await self._read_once(self._count(limit), block_ms)
        except (failures.RedisError, OSError) as error:
            if missing_group(error):
                with self._connector.errors("make the consumer group again"):
                    await self._rebuild(error)
                return []
            await self._lost_connection(error)
            raise self._connector.error(error, "read") from error
        if self._down:
            self._down = False
            _log.info("Redis reader is connected again", extra=self._where())
        return found

    async def _read_once(self, count: int, block_ms: int) -> list[Delivery]:
        while self._backlog:
            found = await self._read_backlog(count)
            if self._client_id is None:
                self._client_id = await self._own_id()
            if found:
                return found
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        keys = [self._membership.keys[topic] for topic in self._topics]
        reply = await self._client.execute_command(
            *self._command(), "COUNT", count, *block, "STREAMS", *keys, *(">" for _ in keys)
        )
        streams = streams_of(reply)
        if streams:
            self._busy = len(streams)
        deliveries: list[Delivery] = []
        for key, entries in streams:
            deliveries += self._deliveries(self._membership.topics[key], entries, {})
        return deliveries

    async def _own_id(self) -> int:
        """The number of this connection, to end its blocking read with; 0 where the ACL forbids."""
        at = self._connector.at(self._client, self._membership.keys[self._topics[0]])
        try:
            return int(await self._client.execute_command("CLIENT ID", **at))
        except failures.ResponseError as error:
            _log.debug("Blocked reads cannot be ended early", extra={"error": reason_of(error)})
            return 0

    async def _read_backlog(self, count: int) -> list[Delivery]:
        """What this consumer was handed before and has not acknowledged: one page of one stream."""
        topic, after = next(iter(self._backlog.items()))
        key = self._membership.keys[topic]
        reply = await self._client.execute_command(
            *self._command(), "COUNT", count, "STREAMS", key, after
        )
        entries = [entry for _, some in streams_of(reply) for entry in some]
        if not entries:
            del self._backlog[topic]
            return []
        first, last = entries[0][0], entries[-1][0]
        attempts = await hand_outs(self._client, self._membership, key, first, last, len(entries))
        self._backlog[topic] = last.decode()
        return self._deliveries(topic, entries, attempts)

    def _command(self) -> tuple[str, ...]:
        return ("XREADGROUP", "GROUP", self._membership.group, self._membership.consumer)

    def _deliveries(
        self, topic: str, entries: Sequence[Entry], attempts: dict[bytes, int]
    ) -> list[Delivery]:
        bytes_max = self._membership.entry_bytes_max
        deliveries: list[Delivery] = []
        for entry_id, flat in entries:
            size = sum(map(len, flat)) if flat is not None else 0
            # Rises at once, falls slowly: one reply too large costs more than some too small.
            self._entry_bytes = max(size, self._entry_bytes * 0.98 + size * 0.02)
            attempt = attempts.get(entry_id, 1)
            deliveries.append(delivery_of(topic, entry_id, flat, size, attempt, bytes_max))
        return deliveries

    def _count(self, limit: int) -> int:
        by_number = -(-limit // self._busy)
        by_bytes = int(READ_BYTES_MAX / (self._entry_bytes * self._busy + 1))
        return max(1, min(by_number, by_bytes))

    # --- trouble --------------------------------------------------------------------------------

    async def _rebuild(self, error: Exception) -> None:
        _log.warning(
            "Stream or consumer group was missing, made again from the first kept message",
            extra={**self._where(), "error": reason_of(error)},
        )
        await self._membership.found(self._client, self._topics)
        self._backlog = dict.fromkeys(self._topics, "0")

    async def _lost_connection(self, error: Exception) -> None:
        """From now on a new connection, which first reads again what this one may have lost."""
        if not self._down:
            self._down = True
            _log.warning(
                "Redis reader lost its connection",
                extra={**self._where(), "error": reason_of(error)},
            )
        self._backlog = dict.fromkeys(self._topics, "0")
        self._client_id = None
        await close_client(self._client)
        # A new client asks anew where the server is: behind Sentinel it may be another one now.
        self._client = self._connector.dedicated(BLOCK_MS_MAX)

    def _where(self) -> dict[str, object]:
        return {
            "server": self._connector.name,
            "group": self._membership.group,
            "consumer": self._membership.consumer,
            "topics": ", ".join(self._topics),
        }


async def hand_outs(
    client: Client, membership: Membership, key: str, first: bytes, last: bytes, count: int
) -> dict[bytes, int]:
    """How often each of this consumer's pending entries from `first` to `last` was handed out."""
    rows = await client.execute_command(
        *("XPENDING", key, membership.group, first, last, count, membership.consumer),
        parse_detail=True,
    )
    return attempts_of(rows)
