"""The systems that are measured: how each is started, and what it promises."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import hiredis
import psutil

from benchmarks.load import Connection
from benchmarks.results import FULL, LIMIT, OURS, STORES
from benchmarks.servers import Place

CHECKOUT = Path(__file__).parents[1]
START_S = 60.0
STOP_S = 20.0
LOG_LINES = 25


class SystemFailed(RuntimeError):
    """A system did not start, died, or did not finish its work in time; ends with its log."""


@dataclass(frozen=True)
class System:
    """Something that can run the workload.

    `name` may end in "+variant"; variants of one system are measured beside each other.
    """

    name: str
    durable: str
    start: Callable[[Place], subprocess.Popen[Any]] = field(compare=False)
    stores: tuple[str, ...] = STORES
    workers: int = 1
    over: str = "acknowledged"
    tuned_for: int = 0
    """Concurrency this one was started for; 0: for any."""


class Running:
    """A started system."""

    def __init__(self, system: System, place: Place, process: subprocess.Popen[Any]) -> None:
        self.system, self.place, self.process = system, place, process

    def tree(self) -> list[psutil.Process]:
        """Its processes that are alive."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_s(self) -> float:
        """Processor time that its processes have had."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def failure(self, what: str) -> SystemFailed:
        """An error that ends with what the system logged last."""
        state = self.process.poll()
        how = "is running" if state is None else f"ended with status {state}"
        log = getattr(self.process, "log", None)  # peers keep their own
        last = log() if log else tail(self.place.log)
        return SystemFailed(f"{self.system.name}: {what} ({how})\n{last}")

    def stop(self) -> None:
        """Ends it: asked first, and with force when it does not."""
        everyone = self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)


class Memory:
    """The most memory that a system's processes had together, looked at now and then."""

    def __init__(self, running: Running, every_s: float = 0.05) -> None:
        self._running, self._every_s = running, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak_mb = 0.0

    def _look(self) -> None:
        processes = self._running.tree()
        while not self._over.wait(self._every_s):
            total = 0
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
            self.peak_mb = max(self.peak_mb, total / 1e6)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def started(system: System, place: Place) -> Iterator[Running]:
    """The system at work in a place. Raises SystemFailed where it does not start."""
    try:
        running = Running(system, place, system.start(place))
    except SystemFailed:
        raise
    except Exception as error:
        raise SystemFailed(f"{system.name}: did not start: {error}\n{tail(place.log)}") from error
    try:
        yield running
    finally:
        running.stop()


def tail(log: Path) -> str:
    """The last lines of a log."""
    if not log.exists():
        return "(no log)"
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


# ----------------------------------------------------------------------------------- ours, the limit


def _launch(command: list[str], place: Place) -> subprocess.Popen[Any]:
    with place.log.open("ab") as log:
        return subprocess.Popen(
            command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def _wait(process: subprocess.Popen[Any], place: Place, ready: Callable[[], bool]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemFailed(f"ended with status {process.returncode}\n{tail(place.log)}")
        if ready():
            return
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise SystemFailed(f"was not ready within {START_S:g} s\n{tail(place.log)}")


def sagacity(*, workers: int = 1, batch: int = 0) -> System:
    """Our worker; `batch` 0 leaves its own limit."""

    def start(place: Place) -> subprocess.Popen[Any]:
        driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
        kind, _, rest = place.store.partition("://")
        command = [
            *(str(Path(sys.executable).with_name("saga-worker")), "benchmarks.imports:service"),
            *("--prefix", "bench", "--migrate", "--quiet", "--log-level", "warning"),
            *("--store", f"{driver[kind]}://{rest}", "--bus", place.redis),
            *("--workers", str(workers)),
            *(("--batch-max", str(batch)) if batch else ()),
        ]
        process = _launch(command, place)
        redis = Connection(place.redis)

        def joined() -> bool:
            try:
                groups = [redis(("XINFO", "GROUPS", f"bench:{t}"))[0] for t in ("imports", "items")]
            except hiredis.ReplyError:  # no such stream yet
                return False
            return all(groups)

        _wait(process, place, joined)
        redis.close()
        return process

    return System(OURS, FULL, start, workers=workers)


def bare_parts(*, overlap: bool, batch: int = 300) -> System:
    """The limit; the variant with `overlap` has two batches under way."""

    def start(place: Place) -> subprocess.Popen[Any]:
        command = [
            *(sys.executable, "-m", "benchmarks.bare", "--store", place.store),
            *("--redis", place.redis, "--batch", str(batch)),
            *(("--overlap",) if overlap else ()),
        ]
        process = _launch(command, place)
        _wait(process, place, lambda: "ready" in tail(place.log))
        return process

    return System(f"{LIMIT}{'+overlap' if overlap else '+in turn'}", FULL, start)
