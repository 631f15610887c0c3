"""A worker process as its parent sees it, and the parent as the worker process sees it.

Settings travel in the environment, never in the arguments that every user of the machine can read.
A socket pair joins the two: the child sends a line of figures each second, and takes its end as the
death of the parent, whichever way that came.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import msgspec

from sagacity.cli.stopping import Stopping
from sagacity.worker.config import Settings
from sagacity.worker.health import WorkerProbe

__all__ = ["Child", "Orders", "Parent"]

log = logging.getLogger(__name__)

ORDERS_VARIABLE: Final = "SAGACITY_INTERNAL_ORDERS"
REPORT_SECONDS: Final = 1.0
SILENT_SECONDS: Final = 15.0
"""A child that has not reported for this long is not healthy."""
_LINE_BYTES_MAX: Final = 65_536


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a child must know besides its settings."""

    fd: int
    """Its end of the socket pair."""
    create: bool = False
    refuse_unsafe: bool = False
    banner: bool = False
    first: bool = True
    """True for one of several, and not for its successors: it tells what is the same for all."""
    workers: int = 1
    health: str = ""
    """Where the parent answers health questions."""


class Report(msgspec.Struct, frozen=True):
    """What a child says about itself."""

    alive: bool
    ready: bool
    figures: dict[str, Any]


class Parent:
    """The parent process, seen from the child: gets reports, and stops the child with itself."""

    def __init__(self, orders: Orders) -> None:
        self._socket = socket.socket(fileno=orders.fd)
        self._socket.setblocking(False)
        os.set_inheritable(orders.fd, False)

    @staticmethod
    def orders() -> Orders | None:
        """What the parent ordered; None in a process that was not started by one of ours.

        Taken out of the environment, so that programs started from here do not take it for theirs.
        """
        text = os.environ.pop(ORDERS_VARIABLE, None)
        return msgspec.json.decode(text, type=Orders) if text else None

    async def attend(self, probe: WorkerProbe, stopping: Stopping) -> None:
        """Reports until cancelled; asks for a stop when the parent has gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._on_end, stopping)
        try:
            while True:
                alive, _ = probe.alive()
                ready, figures = probe.ready()
                line = json.dumps(
                    {"alive": alive, "ready": ready, "figures": figures}, default=str
                ).encode()
                if len(line) < _LINE_BYTES_MAX:
                    with contextlib.suppress(OSError):  # a full buffer: the next report will do
                        self._socket.send(line + b"\n")
                await asyncio.sleep(REPORT_SECONDS)
        finally:
            loop.remove_reader(self._socket)
            self._socket.close()

    def _on_end(self, stopping: Stopping) -> None:
        with contextlib.suppress(BlockingIOError):
            if self._socket.recv(1024) == b"":
                asyncio.get_running_loop().remove_reader(self._socket)
                stopping.request("parent process ended")


class Child:
    """A running worker process, seen from its parent."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer  # never written to, but the connection lives as long as it does
        self._report: Report | None = None
        self._heard_at = self._started_at = time.monotonic()
        self.was_ready = False
        self._listening = asyncio.create_task(self._listen(), name=f"reports of {process.pid}")

    @classmethod
    async def start(
        cls, arguments: Sequence[str], settings: Settings, orders: Mapping[str, Any]
    ) -> Self:
        """Starts ``python -m sagacity`` with `arguments`, `settings` and `orders`."""
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {
                **os.environ,
                **settings.environment(),
                ORDERS_VARIABLE: json.dumps({**orders, "fd": theirs.fileno()}),
            }
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "sagacity",
                *arguments,
                env=environment,
                pass_fds=[theirs.fileno()],
                # Ctrl-C reaches a whole process group; it would reach the child a second time
                # through us, and a second signal means "at once".
                process_group=0,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_BYTES_MAX)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started_at

    @property
    def alive(self) -> bool:
        """True where it reported lately that it makes progress."""
        heard = time.monotonic() - self._heard_at < SILENT_SECONDS
        return heard and (self._report is None or self._report.alive)

    @property
    def ready(self) -> bool:
        """True where it said last that it is ready."""
        return self.alive and self._report is not None and self._report.ready

    def figures(self) -> dict[str, object]:
        """What it said last."""
        return {
            "pid": self.pid,
            "ready": self.ready,
            **(self._report.figures if self._report else {}),
        }

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        status = await self._process.wait()
        self._listening.cancel()
        self._writer.close()
        return status

    async def _listen(self) -> None:
        while line := await self._reader.readline():
            with contextlib.suppress(msgspec.MsgspecError):
                self._report = msgspec.json.decode(line, type=Report)
                self._heard_at = time.monotonic()
                self.was_ready = self.was_ready or self._report.ready
