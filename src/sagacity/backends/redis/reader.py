"""One connection that reads some streams of a consumer group, one command at a time.

A read in flight is never cancelled: what Redis hands out while nobody listens is lost to the caller
until it is reclaimed (protocol.md M1). So a command is a future that outlives the call that asked for
it, and the next call collects its result.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import redis.exceptions as failures

from sagacity.backends.redis.client import Channel, Client, target_of
from sagacity.backends.redis.connection import Connector, missing_group, reason_of
from sagacity.backends.redis.entry import (
    Entry,
    attempts_of,
    delivery_of,
    streams_of,
)
from sagacity.core.delivery import Delivery
from sagacity.core.errors import BusError

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
    """Reads `topics` over a connection of its own; `shared` sends what only happens now and then."""

    def __init__(
        self,
        connector: Connector,
        shared: Client,
        membership: Membership,
        topics: Collection[str],
    ) -> None:
        self._connector = connector
        self._shared = shared
        self._membership = membership
        self._topics = tuple(topics)
        self._keys = [membership.keys[topic] for topic in self._topics]
        self._channel: Channel | None = None
        self._old: Channel | None = None
        """A broken one that is still to be closed."""
        self._flight: asyncio.Future[Any] | None = None
        self._task: asyncio.Task[list[Delivery]] | None = None
        """The flight where it is more than a single command."""
        self.caught_up = asyncio.Event()
        """Unset while what is in flight reads this consumer's pending entries again.

        What is reclaimed meanwhile would be among them, and come twice."""
        self.caught_up.set()
        self._backlog: dict[str, str] = {}
        """Topic -> last own pending entry that was read again; empty once all of them were."""
        self._missing: Exception | None = None
        """What said that a stream or the group has gone."""
        self._busy = 1
        """How many streams had entries in the last reply: COUNT is per stream, a limit is not."""
        self._entry_bytes = membership.entry_bytes_max / 4
        """Moving estimate of an entry's size; careful before the first entries came."""
        self._down = False
        self._number = 0
        """The server's number of the connection; 0 where the ACL forbids to ask for it."""

    # --- the command in flight ------------------------------------------------------------------

    @property
    def flight(self) -> asyncio.Future[Any] | None:
        """What is in flight; done once there is something to collect. Not to be cancelled."""
        return self._flight

    def start(
        self, limit: int, block_ms: int, ended: Callable[[object], None]
    ) -> asyncio.Future[Any]:
        """Puts a command in flight; with `block_ms` 0 it does not wait for entries.

        Calls `ended` when there is something to collect.
        """
        assert self._flight is None
        count, block_ms = self._count(limit), min(block_ms, BLOCK_MS_MAX)
        if self._channel is not None and not self._backlog and self._missing is None:
            self._flight = self._channel.send(*self._fresh(count, block_ms))
        else:
            self.caught_up.clear()
            # An empty context: the task outlives its caller, whose trace is not the parent of its work.
            self._flight = self._task = asyncio.create_task(
                self._catch_up(count, block_ms),
                name=f"redis reader {self._membership.group}",
                context=contextvars.Context(),
            )
        self._flight.add_done_callback(ended)
        return self._flight

    def collect(self) -> list[Delivery]:
        """The result of a flight that is done. Raises BusUnavailable or BusError if it failed."""
        assert self._flight is not None
        flight, task = self._flight, self._task
        self._flight = self._task = None
        try:
            found = task.result() if task is not None else self._taken(flight.result())
        except (failures.RedisError, OSError) as error:
            if missing_group(error):
                self._missing = error
                return []
            self._lost_connection(error)
            raise self._connector.error(error, "read") from error
        if self._down:
            self._down = False
            _log.info("Redis reader is connected again", extra=self._where())
        return found

    async def stop(self, wait_s: float) -> list[Delivery]:
        """Ends the command in flight without losing its result, and closes the connection."""
        rest: list[Delivery] = []
        flight = self._flight
        if flight is not None:
            await self._unblock()  # otherwise it ends within one slice all the same
            await asyncio.wait({flight}, timeout=wait_s)
            if not flight.done():
                flight.cancel()  # the server is silent; what it hands out is reclaimed later
                await asyncio.wait({flight})
            if self._flight is flight and not flight.cancelled():
                try:
                    rest = self.collect()
                except BusError as error:
                    _log.debug("Last read failed", extra={"error": str(error)})
            self._flight = self._task = None
        self.caught_up.set()
        await self._close_channels()
        return rest

    async def _unblock(self) -> None:
        if not self._number:
            return
        try:
            at = await target_of(self._shared, self._keys[0])
            await self._shared.execute_command("CLIENT UNBLOCK", self._number, **at)
        except (failures.RedisError, OSError) as error:
            _log.debug("Blocked read was not ended early", extra={"error": reason_of(error)})

    async def _close_channels(self) -> None:
        for channel in (self._old, self._channel):
            if channel is not None:
                await channel.close()
        self._old = self._channel = None

    # --- reading --------------------------------------------------------------------------------

    def _fresh(self, count: int, block_ms: int) -> tuple[str | int, ...]:
        """The command for entries that nobody was handed."""
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        return (
            *(*self._command(), "COUNT", count, *block, "STREAMS"),
            *(*self._keys, *(">" for _ in self._keys)),
        )

    def _taken(self, reply: Any) -> list[Delivery]:
        streams = streams_of(reply)
        if streams:
            self._busy = len(streams)
        deliveries: list[Delivery] = []
        for key, entries in streams:
            deliveries += self._deliveries(self._membership.topics[key], entries, {})
        return deliveries

    async def _catch_up(self, count: int, block_ms: int) -> list[Delivery]:
        """What stands between this reader and fresh entries, and then those."""
        try:
            if self._missing is not None:
                with self._connector.errors("make the consumer group again"):
                    await self._rebuild(self._missing)
            channel = self._channel
            if channel is None:
                channel = await self._connected()
            while self._backlog:
                found = await self._read_backlog(channel, count)
                if found:
                    return found
        finally:
            self.caught_up.set()
        return self._taken(await channel.send(*self._fresh(count, block_ms)))

    async def _connected(self) -> Channel:
        """A new connection, which first reads again what the one before it may have lost."""
        await self._close_channels()
        # Made anew it asks where the server is: behind Sentinel it may be another one now.
        channel = await self._connector.channel(self._shared, self._keys[0], BLOCK_MS_MAX)
        self._channel = channel
        self._backlog = dict.fromkeys(self._topics, "0")
        try:
            self._number = await channel.number()
        except failures.ResponseError as error:
            self._number = 0
            _log.debug("Blocked reads cannot be ended early", extra={"error": reason_of(error)})
        return channel

    async def _read_backlog(self, channel: Channel, count: int) -> list[Delivery]:
        """What this consumer was handed before and has not acknowledged: one page of one stream."""
        topic, after = next(iter(self._backlog.items()))
        key = self._membership.keys[topic]
        reply = await channel.send(*self._command(), "COUNT", count, "STREAMS", key, after)
        entries = [entry for _, some in streams_of(reply) for entry in some]
        if not entries:
            del self._backlog[topic]
            return []
        first, last = entries[0][0], entries[-1][0]
        attempts = await hand_outs(self._shared, self._membership, key, first, last, len(entries))
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
        await self._membership.found(self._shared, self._topics)
        self._missing = None
        self._backlog = dict.fromkeys(self._topics, "0")

    def _lost_connection(self, error: Exception) -> None:
        if not self._down:
            self._down = True
            _log.warning(
                "Redis reader lost its connection",
                extra={**self._where(), "error": reason_of(error)},
            )
        self._old, self._channel = self._channel or self._old, None
        self._number = 0

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
