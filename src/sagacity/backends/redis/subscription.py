"""A consumer of a group on Redis: reading, reclaiming, acknowledging, leaving."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Sequence

import anyio
import redis.exceptions as failures

from sagacity.backends.redis.client import Client
from sagacity.backends.redis.connection import Connector, missing_group, reason_of
from sagacity.backends.redis.entry import Entry, delivery_of, entry_size, lost
from sagacity.backends.redis.reader import Membership, Reader, hand_outs
from sagacity.core.delivery import Delivery
from sagacity.core.errors import BusError

_log = logging.getLogger(__name__)

_GRACE_S = 0.25
"""How much longer than asked a read waits for a command in flight that is about to end."""
_CLOSE_S = 3.0
"""Longest time that leaving may take; longer than one slice of a blocking read."""
_CLAIM_COUNT_MAX = 100
"""Redis scans ten times this many pending entries in one XAUTOCLAIM, and serves nobody meanwhile."""
_ACK_CHUNK = 1000
_ABANDONED_MS = 7 * 24 * 3600 * 1000
"""Idle time given to entries that are handed back, so that whoever reclaims next takes them."""

_FORGET_CONSUMER = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
return -1
"""
"""XGROUP DELCONSUMER drops what is pending for good, so only where nothing is (protocol.md row 7)."""


class RedisSubscription:
    """One consumer of one group; see `sagacity.ports.Subscription` for what it promises.

    Not for use by several tasks at once, except `wake` and `ack`.
    """

    def __init__(
        self, connector: Connector, shared: Client, pipelined: Client, membership: Membership
    ) -> None:
        self._connector = connector
        self._shared = shared
        self._pipelined = pipelined
        self._membership = membership
        topics = tuple(membership.keys)
        # In a cluster each stream may live on another node: one read per stream (row 26).
        parts = [(topic,) for topic in topics] if connector.cluster else [topics]
        self._readers = [Reader(connector, shared, membership, part) for part in parts if part]
        self._ready: deque[Delivery] = deque()
        """Read, but not handed to the caller yet."""
        self._waker: asyncio.Future[None] | None = None
        self._woken = False
        self._closed = False
        self._sweep: dict[str, str] = {}
        """Topic -> cursor of the reclaim sweep that is under way."""

    # --- reading --------------------------------------------------------------------------------

    async def read(self, limit: int, wait_ms: int) -> list[Delivery]:
        """Up to `limit` new entries, or what is still pending; see `Subscription.read`.

        Raises BusUnavailable where the server cannot be reached, and reads on when asked again.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_ms / 1000
        asked = False
        while not self._ready and not self._woken:
            remaining = max(0.0, deadline - loop.time())
            if asked and remaining <= 0:
                break
            await self._wait_once(limit, remaining)
            asked = True
        self._woken = False
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    async def _wait_once(self, limit: int, remaining_s: float) -> None:
        """Puts a command in flight for each reader that has none, and waits for the first end."""
        block_ms = int(remaining_s * 1000)
        ended = False
        for reader in self._readers:
            flight = reader.flight or reader.start(limit, block_ms, self._ring)
            ended = ended or flight.done()
        if not ended:
            await self._until_rung(remaining_s + _GRACE_S)
        failure: BusError | None = None
        for reader in self._readers:
            if reader.flight is not None and reader.flight.done():
                try:
                    self._ready.extend(reader.collect())
                except BusError as error:
                    failure = error
        if failure is not None and not self._ready:
            raise failure

    async def _until_rung(self, wait_s: float) -> None:
        """Waits for a flight to end, or for `wake`, and at most for `wait_s`.

        To cancel this leaves the commands in flight; their results come with the next read.
        """
        loop = asyncio.get_running_loop()
        self._waker = loop.create_future()
        timer = loop.call_later(wait_s, self._ring)
        try:
            await self._waker
        finally:
            timer.cancel()
            self._waker = None

    def _ring(self, _: object = None) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def wake(self) -> None:
        """Makes a waiting `read`, or else the next one, return at once."""
        self._woken = True
        self._ring()

    # --- reclaiming -----------------------------------------------------------------------------

    async def reclaim(self, min_idle_ms: int, limit: int) -> list[Delivery]:
        """Up to `limit` entries that were left for `min_idle_ms`; see `Subscription.reclaim`.

        A sweep keeps its place between calls and ends when all streams were seen to their ends.
        """
        for reader in self._readers:
            await reader.caught_up.wait()
        self._check_open()
        taken: list[Delivery] = []
        with self._connector.errors("reclaim"):
            if not self._sweep:
                self._sweep = dict.fromkeys(self._membership.keys, "0-0")
            while self._sweep and len(taken) < limit:
                topic, cursor = next(iter(self._sweep.items()))
                count = min(limit - len(taken), _CLAIM_COUNT_MAX)
                following, deliveries = await self._claim(topic, cursor, min_idle_ms, count)
                taken += deliveries
                # Redis looks at ten times COUNT pending entries: nothing found is not the end,
                # only the cursor says so (row 6).
                if following == "0-0":
                    del self._sweep[topic]
                else:
                    self._sweep[topic] = following
        return taken

    async def _claim(
        self, topic: str, cursor: str, min_idle_ms: int, count: int
    ) -> tuple[str, list[Delivery]]:
        member = self._membership
        key = member.keys[topic]
        try:
            reply = await self._shared.execute_command(
                *("XAUTOCLAIM", key, member.group, member.consumer, min_idle_ms, cursor),
                *("COUNT", count),
            )
        except failures.ResponseError as error:
            if missing_group(error):  # the reader makes it again
                return "0-0", []
            raise
        following = reply[0].decode()
        entries: Sequence[Entry | None] = reply[1]
        found = [entry for entry in entries if entry is not None]
        attempts = {}
        if found:
            attempts = await hand_outs(
                self._shared, member, key, found[0][0], found[-1][0], 10 * _CLAIM_COUNT_MAX
            )
        deliveries = [
            delivery_of(
                topic,
                entry_id,
                flat,
                entry_size(flat or ()),
                attempts.get(entry_id, 2),
                member.entry_bytes_max,
            )
            for entry_id, flat in found
        ]
        # Redis 7 names the entries whose payload is gone, and forgets them itself.
        named: list[bytes] = reply[2] if len(reply) > 2 else []
        deliveries += [lost(topic, gone.decode(), attempt=2) for gone in named]
        if len(found) < len(entries):
            deliveries += await self._nameless(topic, cursor, following, found)
        return following, deliveries

    async def _nameless(
        self, topic: str, cursor: str, following: str, found: Sequence[Entry]
    ) -> list[Delivery]:
        """The claimed entries whose payload is gone: Redis 6.2 says that there are some, not which."""
        member = self._membership
        key = member.keys[topic]
        known = {entry[0] for entry in found}
        gone: list[Delivery] = []
        start, end = cursor, "+" if following == "0-0" else following
        while True:
            rows = await self._shared.execute_command(
                *("XPENDING", key, member.group, start, end, _ACK_CHUNK, member.consumer),
                parse_detail=True,
            )
            for row in rows:
                entry_id = row["message_id"]
                if entry_id not in known and not await self._shared.execute_command(
                    "XRANGE", key, entry_id, entry_id
                ):
                    attempt = int(row["times_delivered"])
                    gone.append(lost(topic, entry_id.decode(), attempt=attempt))
            if len(rows) < _ACK_CHUNK:
                return gone
            start = "(" + rows[-1]["message_id"].decode()

    # --- acknowledging --------------------------------------------------------------------------

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Marks entries as done for the group.

        Redis does not say which were not pending (reclaimed and done elsewhere, or a group made
        again); that only means a copy later, so it is no error (protocol.md row 16).
        """
        by_topic: defaultdict[str, list[str]] = defaultdict(list)
        for delivery in deliveries:
            by_topic[delivery.topic].append(delivery.entry_id)
        done = 0
        with self._connector.errors("acknowledge"):
            for topic, entry_ids in by_topic.items():
                key = self._membership.keys[topic]
                for start in range(0, len(entry_ids), _ACK_CHUNK):
                    done += await self._pipelined.execute_command(
                        "XACK", key, self._membership.group, *entry_ids[start : start + _ACK_CHUNK]
                    )
        if done < len(deliveries):
            _log.debug(
                "Some entries were not pending any more",
                extra={
                    "group": self._membership.group,
                    "acknowledged": len(deliveries),
                    "pending": done,
                },
            )

    # --- leaving --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Leaves: hands back what was read but not handed out, and ends the connection."""
        if self._closed:
            return
        self._closed = True
        self.wake()
        with anyio.CancelScope(shield=True):
            for reader in self._readers:
                self._ready.extend(await reader.stop(_CLOSE_S))
            with anyio.move_on_after(_CLOSE_S):
                try:
                    await self._hand_back()
                    await self._forget()
                except (failures.RedisError, OSError) as error:
                    # Whoever reclaims takes over what is pending; the janitor forgets the consumer.
                    _log.debug("Consumer left without a word", extra={"error": reason_of(error)})

    async def _hand_back(self) -> None:
        """Makes entries that nobody has worked on free to reclaim at once."""
        by_topic: defaultdict[str, list[str]] = defaultdict(list)
        for delivery in self._ready:
            by_topic[delivery.topic].append(delivery.entry_id)
        self._ready.clear()
        member = self._membership
        for topic, entry_ids in by_topic.items():
            await self._shared.execute_command(
                *("XCLAIM", member.keys[topic], member.group, member.consumer, 0, *entry_ids),
                *("IDLE", _ABANDONED_MS, "JUSTID"),
                parse_justid=True,
            )

    async def _forget(self) -> None:
        for key in self._membership.keys.values():
            await forget_consumer(
                self._shared, key, self._membership.group, self._membership.consumer
            )

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(
                f"subscription of group {self._membership.group} is closed; expected an open one; "
                "join again"
            )


async def forget_consumer(client: Client, key: str, group: str, consumer: str) -> bool:
    """Removes a consumer from a group unless something is pending for it."""
    removed = await client.execute_command("EVAL", _FORGET_CONSUMER, 1, key, group, consumer)
    return int(removed) >= 0
