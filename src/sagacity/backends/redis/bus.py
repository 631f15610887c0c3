"""The bus over Redis Streams: one stream per topic, consumer groups of Redis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import redis.exceptions as failures

from sagacity.backends.redis.checks import server_info, unsafe_lines
from sagacity.backends.redis.client import close_client
from sagacity.backends.redis.connection import Connector, reason_of
from sagacity.backends.redis.publishing import Batch
from sagacity.backends.redis.reader import Membership
from sagacity.backends.redis.subscription import RedisSubscription
from sagacity.backends.redis.trimming import forget_consumers, trim
from sagacity.core.delivery import Envelope

_FRAME_BYTES = 64 * 1024
"""What an entry may hold beside its body: ids, names, trace context, foreign fields."""


class RedisBus:
    """Topics as Redis streams named ``{prefix}:{topic}``; see `sagacity.ports.Bus`.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://`` or ``redis+cluster://``.
        prefix: What the names of all keys begin with; services that talk to each other share it.
        payload_bytes_max: Largest body of a message, in bytes.
        timeout_s: How long a connection or a short command may take.
        connections_max: Connections for what is rare; more callers than that wait. All publishing and
            acknowledging goes over one more, and each subscription reads over one of its own; in a
            cluster the first two share.
        protocol: RESP version to speak.

    Raises ConfigurationError for a URL it does not know. Nothing is connected before first use.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "sagacity",
        payload_bytes_max: int = 262_144,
        timeout_s: float = 5.0,
        connections_max: int = 16,
        protocol: Literal[2, 3] = 2,
    ) -> None:
        self._prefix = prefix
        self._payload_bytes_max = payload_bytes_max
        self._connector = Connector(
            url, timeout_s=timeout_s, connections_max=connections_max, protocol=protocol
        )
        self._client = self._connector.shared()
        self._pipelined = self._connector.pipelined(self._client)
        """Publishes and acknowledges: what every batch does."""
        self._subscriptions: list[RedisSubscription] = []

    def __repr__(self) -> str:
        return f"RedisBus({self._connector.name!r}, prefix={self._prefix!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def key(self, topic: str) -> str:
        """The name of a topic's stream."""
        return f"{self._prefix}:{topic}"

    # --- Bus ------------------------------------------------------------------------------------

    async def publish(self, envelopes: Sequence[Envelope]) -> None:
        """Appends each envelope to its topic, in order; see `Bus.publish`.

        One script for all, in a cluster one for each topic: Redis then takes all entries of a topic
        or none, also where its memory ends half-way (protocol.md M17). Raises BusError, before
        anything is sent, for a message that is too large.
        """
        batches: dict[str, Batch] = {}
        for envelope in envelopes:
            # In a cluster each stream may live on another node.
            part = envelope.topic if self._connector.cluster else ""
            batch = batches.get(part)
            if batch is None:
                batch = batches[part] = Batch(self._payload_bytes_max, self._entry_bytes_max)
            batch.add(self.key(envelope.topic), envelope)
        for batch in batches.values():
            with self._connector.errors("publish"):
                await self._pipelined.execute_command(*batch.command())

    async def join(self, group: str, consumer: str, topics: Collection[str]) -> RedisSubscription:
        """Makes the group where it is missing, and joins it; see `Bus.join`."""
        membership = Membership(
            group=group,
            consumer=consumer,
            keys={topic: self.key(topic) for topic in dict.fromkeys(topics)},
            entry_bytes_max=self._entry_bytes_max,
        )
        with self._connector.errors("join a consumer group"):
            await membership.found(self._client, membership.keys)
        subscription = RedisSubscription(self._connector, self._client, self._pipelined, membership)
        self._subscriptions.append(subscription)
        return subscription

    async def check(self) -> list[str]:
        """Reaches the server; returns one line per unsafe setting found."""
        with self._connector.errors("answer"):
            servers = await server_info(self._client, self._connector)
        return [line for name, facts in servers.items() for line in unsafe_lines(name, facts)]

    async def close(self) -> None:
        """Closes the subscriptions that are still open, then all connections."""
        while self._subscriptions:
            await self._subscriptions.pop().close()
        await self._pipelined.aclose()
        await close_client(self._client)

    # --- for the janitor ------------------------------------------------------------------------

    async def trim(self, topics: Collection[str], retention_us: int) -> int:
        """Removes entries older than `retention_us` that every group has acknowledged.

        A topic that no group has joined is left alone. Returns how many entries went.
        """
        with self._connector.errors("trim"):
            return sum(
                [await trim(self._client, self.key(topic), retention_us) for topic in topics]
            )

    async def forget_consumers(self, group: str, topics: Collection[str], idle_us: int) -> int:
        """Removes consumers that were idle for `idle_us` and have nothing pending."""
        with self._connector.errors("forget consumers"):
            return sum(
                [
                    await forget_consumers(self._client, self.key(topic), group, idle_us)
                    for topic in topics
                ]
            )

    # --- for the loss check (worker/recovery.py) --------------------------------------------------

    async def epoch(self, proposed: str) -> str:
        """The random value that says that this is the Redis of before; see `BusMemory`."""
        key = f"{self._prefix}::epoch"  # no topic has an empty name
        with self._connector.errors("read the epoch"):
            value = await self._client.execute_command("GET", key)
            if value is None:
                await self._client.execute_command("SET", key, proposed, "NX")
                value = await self._client.execute_command("GET", key)
        return value.decode() if value is not None else proposed

    async def identity(self) -> str:
        """Run and replication ids, of all primaries in a cluster; see `BusMemory`."""
        with self._connector.errors("name itself"):
            servers = await server_info(self._client, self._connector)
        return " ".join(
            sorted(
                f"{facts.get('run_id')}/{facts.get('master_replid')}" for facts in servers.values()
            )
        )

    async def holds(self, topic: str, entry_id: str) -> bool:
        """True where the entry is there, read or not."""
        with self._connector.errors("look for an entry"):
            return bool(
                await self._client.execute_command("XRANGE", self.key(topic), entry_id, entry_id)
            )

    async def last_entry_id(self, topic: str) -> str | None:
        """The highest entry id a topic has given out; see `BusMemory`."""
        try:
            info: dict[str, Any] = await self._client.execute_command(
                "XINFO STREAM", self.key(topic)
            )
        except failures.ResponseError as error:
            if reason_of(error).lower().endswith("no such key"):
                return None
            raise self._connector.error(error, "read a stream's position") from error
        except (failures.RedisError, OSError) as error:
            raise self._connector.error(error, "read a stream's position") from error
        last = info["last-generated-id"].decode()
        return last if last != "0-0" else None

    @property
    def _entry_bytes_max(self) -> int:
        return self._payload_bytes_max + _FRAME_BYTES
