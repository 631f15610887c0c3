"""A TCP proxy that breaks connections at a chosen point, between a client and a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK = 65536


@dataclass
class Connection:
    """One client of the proxy and its counterpart at the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    doomed: bool = False
    """The next reply is thrown away and the connection is cut."""
    sent: bytes = field(default=b"", repr=False)
    """The end of what the client has sent."""


class TcpProxy:
    """Passes bytes on, until it is told not to: ``async with TcpProxy(upstream) as proxy``.

    `upstream` is the path of a unix socket or a TCP port of 127.0.0.1.
    """

    def __init__(self, upstream: str | int) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._condemned: list[bytes] = []
        self.accepted = 0
        """Connections made so far."""
        self.cut = 0
        """Replies thrown away so far."""

    @property
    def port(self) -> int:
        """Where clients connect, on 127.0.0.1."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut_reply_to(self, request: bytes) -> None:
        """Lets the next request that contains `request` through, and cuts instead of answering."""
        self._condemned.append(request)

    def cut_all(self) -> None:
        """Closes every connection now."""
        for connection in self._connections:
            connection.client.close()
            connection.server.close()
        self._connections.clear()

    def freeze(self) -> None:
        """Keeps connections open and passes nothing on, as a network that drops packets."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Passes on again, first what came meanwhile."""
        self._flowing.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(self._upstream, str):
            upstream = await asyncio.open_unix_connection(self._upstream)
        else:
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
        self.accepted += 1
        connection = Connection(writer, upstream[1])
        self._connections.append(connection)
        for source, pump in ((reader, self._requests), (upstream[0], self._replies)):
            task = asyncio.create_task(self._pump(source, connection, pump))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        connection: Connection,
        to: Callable[[Connection, bytes], Awaitable[None]],
    ) -> None:
        try:
            while data := await source.read(_CHUNK):
                await self._flowing.wait()
                await to(connection, data)
        except OSError:
            return
        finally:
            connection.client.close()
            connection.server.close()
            with contextlib.suppress(ValueError):
                self._connections.remove(connection)

    async def _requests(self, connection: Connection, data: bytes) -> None:
        connection.sent = connection.sent[-1000:] + data
        for request in self._condemned:
            if request in connection.sent:
                self._condemned.remove(request)
                connection.doomed = True
                break
        connection.server.write(data)
        await connection.server.drain()

    async def _replies(self, connection: Connection, data: bytes) -> None:
        if connection.doomed:
            self.cut += 1
            raise ConnectionResetError("cut on purpose")
        connection.client.write(data)
        await connection.client.drain()
