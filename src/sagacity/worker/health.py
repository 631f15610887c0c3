"""``/healthz`` and ``/readyz`` over HTTP, for supervisors and load balancers.

Small on purpose: two read-only questions need no web framework, and every bound is visible here. A
request is at most `HEAD_BYTES_MAX` long, must arrive within `REQUEST_SECONDS`, and gets one answer on
a connection that is then closed. Without a host it listens on 127.0.0.1 only; what it tells are
figures, never URLs, keys or payloads.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Final, Protocol, Self

from sagacity.core.errors import ConfigurationError

__all__ = ["HealthServer", "Probe", "WorkerProbe"]

HEAD_BYTES_MAX: Final = 8192
REQUEST_SECONDS: Final = 5.0
CONNECTIONS_MAX: Final = 32
STALLED_SECONDS: Final = 60.0
"""A worker whose loop has not come round for this long is not healthy."""

log = logging.getLogger(__name__)


class Probe(Protocol):
    """Whom the questions are passed to."""

    def alive(self) -> tuple[bool, dict[str, object]]:
        """Whether the process still makes progress, and figures."""
        ...

    def ready(self) -> tuple[bool, dict[str, object]]:
        """Whether it can take work now, and figures."""
        ...


class Reporting(Protocol):
    """What a worker tells about itself."""

    @property
    def ready(self) -> bool:
        """True where it joined its group and reaches its servers."""
        ...

    def report(self) -> dict[str, object]:
        """Live figures; ``idle_s`` is how long the worker's loop has not come round."""
        ...


class WorkerProbe:
    """Answers for one worker in this process.

    The questions are answered by the worker's own event loop, so a blocked loop does not answer at
    all, and the supervisor's time-out is the verdict.
    """

    def __init__(self, worker: Reporting) -> None:
        self._worker = worker

    def alive(self) -> tuple[bool, dict[str, object]]:
        """False where the worker's loop stands still although it has joined its group."""
        idle = self._worker.report().get("idle_s", 0)
        moving = not isinstance(idle, int | float) or idle < STALLED_SECONDS
        return moving or not self._worker.ready, {"idle_s": idle}

    def ready(self) -> tuple[bool, dict[str, object]]:
        """The worker's own word, with its figures."""
        return self._worker.ready, self._worker.report()


class HealthServer:
    """Answers on `host`:`port` while its ``async with`` block runs; port 0 takes a free one."""

    def __init__(self, host: str, port: int, probe: Probe) -> None:
        self._host, self._port = host, port
        self._probe = probe
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        assert self._server is not None, "the server has not been started"
        host, port, *_ = self._server.sockets[0].getsockname()
        return host, port

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(
                self._connected, self._host, self._port, limit=HEAD_BYTES_MAX
            )
        except OSError as error:
            raise ConfigurationError(
                f"--health (SAGACITY_HEALTH): cannot listen on {self._host}:{self._port}; expected "
                f"a free port of this machine, got: {error.strerror}; name another one"
            ) from error
        host, port = self.address
        log.info("Health server started", extra={"host": host, "port": port})
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) > CONNECTIONS_MAX:
                return
            async with asyncio.timeout(REQUEST_SECONDS):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, ConnectionError):
            return  # too slow, or gone: there is nobody to tell
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(431, {"error": f"expected at most {HEAD_BYTES_MAX} bytes of header"})
        except asyncio.IncompleteReadError:
            return _response(400, {"error": "expected a complete HTTP request"})
        method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _response(400, {"error": "expected HTTP/1.1"})
        if method not in {b"GET", b"HEAD"}:
            return _response(405, {"error": "expected GET or HEAD"}, allow=True)
        questions: dict[bytes, Callable[[], tuple[bool, dict[str, object]]]] = {
            b"/healthz": self._probe.alive,
            b"/readyz": self._probe.ready,
        }
        question = questions.get(target.partition(b"?")[0])
        if question is None:
            return _response(404, {"error": "expected /healthz or /readyz"})
        try:
            good, figures = question()
        except Exception:
            log.exception("Health question failed")
            good, figures = False, {"error": "the question failed; see the log"}
        body = {"status": "ok" if good else "unavailable", **figures}
        return _response(200 if good else 503, body, body=method == b"GET")


_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def _response(
    status: int, content: dict[str, object], *, body: bool = True, allow: bool = False
) -> bytes:
    payload = json.dumps(content, default=str, allow_nan=True).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if allow:
        lines.append("Allow: GET, HEAD")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    return head + payload if body else head
