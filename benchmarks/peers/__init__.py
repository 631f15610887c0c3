"""The systems that Sagacity is compared with, each in a virtual environment of its own.

    python = install("dbos")
    with start("dbos", "postgresql://...", "unix:///...", concurrency=50) as peer: ...

A peer is a module here, run as ``python -m benchmarks.peers.<name>``: as a script it would shadow the
library whose name it bears. It announces finished sagas on the stream `bench:finished`.
"""

from __future__ import annotations

import contextlib
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "benchmarks" / ".venvs"
INSTALL_SECONDS = 600.0
READY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class System:
    """One peer: what to install, and how to measure it."""

    distribution: str
    requirements: tuple[str, ...]
    durable: str
    """What is committed at each step."""
    concurrencies: Mapping[str, tuple[int, ...]]
    """Store -> values of `--concurrency` worth a run; the load has as many sagas under way."""
    without: str = ""
    """Why a store is not among them."""
    over: Literal["announced", "acknowledged"] = "announced"
    """How `benchmarks.load` learns that a saga is over."""

    @property
    def stores(self) -> tuple[str, ...]:
        return tuple(self.concurrencies)


PEERS: Mapping[str, System] = MappingProxyType(
    {
        "dbos": System(
            distribution="dbos",
            requirements=(
                "dbos==3.4.0",
                "sqlalchemy==2.1.9",
                "psycopg[binary]==3.3.9",
                "hiredis==3.5.0",
            ),
            durable="input, each step's output and result; commands may be doubled",
            concurrencies={"postgresql": (1, 10, 50, 200), "sqlite": (1, 4, 10)},
        ),
        "python_cqrs": System(
            distribution="python-cqrs",
            requirements=(
                "python-cqrs[sqlalchemy]==5.3.0",
                "sqlalchemy==2.0.58",
                "asyncpg==0.32.0",
                "aiosqlite==0.22.1",
                "hiredis==3.5.0",
            ),
            durable="state and log with each step; commands may be doubled; "
            "recovery is the application's",
            concurrencies={"postgresql": (1, 10, 50, 200)},
            without="its saga log's BIGINT identity is not filled by SQLite",
        ),
        "eventsourcing": System(
            distribution="eventsourcing",
            requirements=("eventsourcing[postgres]==9.5.6", "psycopg==3.3.9", "hiredis==3.5.0"),
            durable="state, history and stream position with each step; commands may be doubled",
            concurrencies={"postgresql": (1, 4, 10, 50), "sqlite": (1, 4, 10)},
        ),
        "edda": System(
            distribution="edda-framework",
            requirements=(
                "edda-framework==0.16.2",
                "sqlalchemy==2.1.9",
                "asyncpg==0.32.0",
                "aiosqlite==0.22.1",
                "uvloop==0.23.0",
                "hiredis==3.5.0",
            ),
            durable="input, each activity's result and status; commands may be doubled; no inbox",
            concurrencies={"postgresql": (1, 10, 50, 200), "sqlite": (1, 4, 10)},
        ),
        "faststream": System(
            distribution="faststream",
            requirements=(
                "faststream[redis]==0.7.8",
                "redis==8.1.0",
                "sqlalchemy[asyncio]==2.1.9",
                "asyncpg==0.32.0",
                "aiosqlite==0.22.1",
                "uvloop==0.23.0",
                "hiredis==3.5.0",
            ),
            durable="state, inbox, outbox and history with each step",
            concurrencies={"postgresql": (1, 10, 50, 200), "sqlite": (1, 4, 10)},
        ),
    }
)


class PeerFailed(RuntimeError):
    """A peer could not be installed, or did not get ready."""


class Peer(subprocess.Popen[bytes]):
    """A peer's process; leaving its ``with`` block ends it."""

    def __init__(self, command: list[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        super().__init__(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log)

    def log(self, lines: int = 20) -> str:
        """The last lines of its standard error."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM, and SIGKILL if that does not end it."""
        if self.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(seconds)
        if self.poll() is None:
            self.kill()
            self.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        super().__exit__(kind, error, traceback)


def install(name: str) -> Path:
    """Makes a peer's environment unless it is there; returns its interpreter.

    Raises:
        PeerFailed: with the last lines of the installer.
    """
    requirements = "\n".join(PEERS[name].requirements)
    environment = ENVIRONMENTS / name
    python = environment / "bin" / "python"
    done = environment / "installed.txt"
    if not done.exists() or done.read_text() != requirements:
        _run(name, [sys.executable, "-m", "venv", "--clear", str(environment)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run(name, [*pip, *PEERS[name].requirements])
        done.write_text(requirements)
    return python


def start(name: str, store: str, redis: str, concurrency: int) -> Peer:
    """Starts a peer and waits until it consumes.

    Args:
        name: Of `PEERS`; its environment is installed if it is not there.
        store: ``postgresql://...`` or ``sqlite:///path``, without a driver.
        redis: ``unix:///path`` or ``redis://host:port``.
        concurrency: Sagas, or tasks, that it may have under way.

    Raises:
        PeerFailed: with the last lines of its standard error.
    """
    if store.partition(":")[0] not in PEERS[name].stores:
        raise PeerFailed(f"{name} has no {store.partition(':')[0]}: {PEERS[name].without}")
    command = [str(install(name)), "-m", f"benchmarks.peers.{name}"]
    command += ["--store", store, "--redis", redis, "--concurrency", str(concurrency)]
    peer = Peer(command)
    try:
        _wait_until_ready(name, peer)
    except BaseException:
        peer.stop()
        raise
    return peer


def _wait_until_ready(name: str, peer: Peer) -> None:
    assert peer.stdout is not None
    deadline = time.monotonic() + READY_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(peer.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            line = peer.stdout.readline()
            if line == b"ready\n":
                return
            if not line:
                peer.wait()
                raise PeerFailed(f"{name} exited with {peer.returncode}:\n{peer.log()}")
    raise PeerFailed(f"{name} was not ready after {READY_SECONDS:g} s:\n{peer.log()}")


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"{name} was not installed after {INSTALL_SECONDS:g} s") from error
    if done.returncode:
        last = "\n".join(done.stdout.decode(errors="replace").splitlines()[-20:])
        raise PeerFailed(f"{name} cannot be installed ({' '.join(command)}):\n{last}")
