"""What is used of a client of Redis, whichever kind it is."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any, Protocol, cast

from redis.asyncio.cluster import RedisCluster


class Client(Protocol):
    """Commands of many tasks."""

    async def execute_command(self, *command: Any, **options: Any) -> Any:
        """Sends one command and returns its parsed reply."""
        ...

    async def aclose(self) -> None:
        """Ends the client."""
        ...


class Channel(Protocol):
    """One connection, for one reader. Broken once, it stays broken: each command then fails.

    A connection that is replaced without a word would hide from its reader that it has to read its
    pending entries again.
    """

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Puts a command in flight, one word each. Its future takes the reply, or what redis-py raises."""
        ...

    async def number(self) -> int:
        """The server's number of this connection, to end its blocking reads with."""
        ...

    async def close(self) -> None:
        """Ends the connection, and fails what is in flight."""
        ...


class ClientChannel:
    """The channel over a client of redis-py that is used for nothing else.

    For a cluster, whose client knows which node has the stream of `key`.
    """

    def __init__(self, client: Client, key: str) -> None:
        self._client, self._key = client, key

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """A task for the command; see `Channel.send`."""
        # An empty context: it outlives its caller, whose trace is not the parent of its work.
        return asyncio.create_task(
            cast("Any", self._client.execute_command(*command)), context=contextvars.Context()
        )

    async def number(self) -> int:
        """See `Channel.number`."""
        at = await target_of(self._client, self._key)
        return int(await self._client.execute_command("CLIENT ID", **at))

    async def close(self) -> None:
        """See `Channel.close`."""
        await close_client(self._client)


async def target_of(client: Client, key: str) -> dict[str, Any]:
    """Options that send a command without a key to the server that holds `key`."""
    if not isinstance(client, RedisCluster):
        return {}
    await client.initialize()  # it learns its nodes with its first command
    return {"target_nodes": client.get_node_from_key(key)}


async def close_client(client: Client) -> None:
    """Ends a client with all connections it has, those to Sentinel too. Safe to call twice."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if pool is not None:
        await pool.disconnect()
        await close_watchers(pool)


async def close_watchers(pool: Any) -> None:
    """Ends the connections to Sentinel of a pool that has some."""
    manager = getattr(pool, "sentinel_manager", None)
    for watcher in manager.sentinels if manager is not None else ():
        await watcher.aclose()
