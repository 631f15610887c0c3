"""What the simulated remote systems share as OS processes: a port, an announcement, an end."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LOOPBACK: Final = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """Return a socket listening on loopback; port 0 takes a free one."""
    # asyncio turns Nagle's delay off only for sockets that name their protocol, which
    # socket.create_server leaves out: every answer would come 40 ms late.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError:
        listener.close()
        raise
    listener.listen(256)
    listener.setblocking(False)
    return listener


def port_of(listener: socket.socket) -> int:
    """Return the port a listening socket is bound to."""
    port: int = listener.getsockname()[1]
    return port


def announce(facts: Mapping[str, object]) -> None:
    """Tell the starter where this process can be reached: one JSON line on standard output."""
    print(json.dumps({**facts, "pid": os.getpid()}), flush=True)


def now_us() -> int:
    """Return the wall clock in microseconds since 1970, as the ledgers record it."""
    return time.time_ns() // 1000


def end_with_stdin() -> None:
    """End this process as by SIGTERM once standard input closes, so that it cannot outlive a starter
    that holds the other end of the pipe.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()


async def serve_http(app: Starlette, listener: socket.socket) -> None:
    """Serve `app` on `listener` until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        http=_ReachableProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,  # a request held by a fault must not hold the process
    )
    await uvicorn.Server(config).serve(sockets=[listener])


class NoReply(Response):
    """Closes the connection instead of answering, like a server that dies after its work."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del send  # that is the point
        transport: asyncio.Transport = scope["state"]["transport"]
        transport.close()
        await disconnected(receive)


async def disconnected(receive: Receive) -> None:
    """Wait until the client's connection is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def disconnection(receive: Receive) -> AsyncGenerator[asyncio.Task[None]]:
    """A task that ends when the client is gone; it is cancelled on leaving the block."""
    task = asyncio.create_task(disconnected(receive))
    try:
        yield task
    finally:
        task.cancel()


class _ReachableProtocol(H11Protocol):
    """Lets a request find the connection it came by, as `request.state.transport`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
