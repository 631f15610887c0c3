"""One load on one running system, and many of them taking turns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from benchmarks.cases import Case, sagas
from benchmarks.results import Row
from benchmarks.servers import Servers
from benchmarks.systems import CHECKOUT, Memory, Running, System, SystemFailed, started

LOAD_DEADLINE_S = 60.0
WARM_UP = 200
"""Sagas that are run before anything is measured."""


@dataclass
class Ledger:
    """What was measured so far, and what failed."""

    repeats: list[Row] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    say: Callable[[str], None] = print

    def fail(self, error: SystemFailed, where: str) -> None:
        """Notes a failure and goes on."""
        self.failures.append(f"{where}: {error}")
        self.say(f"FAILED {where}: {error}")


def load(running: Running, case: Case, count: int) -> dict[str, float]:
    """The figures of one load, and the memory of the system. Raises SystemFailed."""
    workload = () if "--workload" in case.options else ("--workload", "happy")
    command = [
        *(sys.executable, "-m", "benchmarks.load", "--redis", running.place.redis),
        *("--sagas", str(count), "--concurrency", str(max(1, case.concurrency))),
        *("--over", running.system.over, "--deadline-s", f"{LOAD_DEADLINE_S:g}"),
        *(("--rate", f"{case.rate:g}") if case.rate else ()),
        *workload,
        *case.options,
    ]
    with Memory(running) as memory:
        output, error = _finished(command, running, case)
    if not output:
        last = (error.strip().splitlines() or ["no word"])[-1]
        raise running.failure(f"{case.workload} at {case.concurrency}: {last}")
    figures: dict[str, float] = json.loads(output)
    return {**figures, "rss_mb": memory.peak_mb}


def _finished(command: list[str], running: Running, case: Case) -> tuple[str, str]:
    """What a load printed. Raises SystemFailed as soon as the system has died."""
    until = time.monotonic() + LOAD_DEADLINE_S + 15
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    output, error = process.communicate(timeout=0.5)
                    if running.process.poll() is None:
                        return output, error
                if running.process.poll() is not None:
                    raise running.failure(f"died under {case.workload} at {case.concurrency}")
        finally:
            process.kill()
    raise running.failure(f"the load did not end ({case.workload})")


class Turns:
    """Systems on one store that are up at the same time and are measured in turn.

    Whatever the machine does meanwhile, it does to all of them.
    """

    def __init__(self, servers: Servers, store: str, ledger: Ledger, seconds: float) -> None:
        self._servers, self._store, self._ledger, self._seconds = servers, store, ledger, seconds
        self._stack = ExitStack()
        self._up: list[Running] = []
        self._pace: dict[tuple[str, int, int, Case], float] = {}
        self._general: dict[tuple[str, int, int], float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def running(self) -> Sequence[Running]:
        """The systems that are up."""
        return self._up

    def add(self, systems: Sequence[System]) -> None:
        """Starts systems and warms them up; one that fails is left out."""
        for system in systems:
            if self._store not in system.stores:
                continue
            began = time.monotonic()
            try:
                place = self._stack.enter_context(self._servers.place(self._store, system.name))
                running = self._stack.enter_context(started(system, place))
                warm = Case("warm-up", min(100, system.tuned_for or 100))
                first = load(running, warm, 20)
                figures = load(running, warm, int(min(WARM_UP, first["sagas_per_s"]) + 20))
            except SystemFailed as error:
                self._ledger.fail(error, f"{self._store}, start")
                continue
            self._general[_which(system)] = figures["sagas_per_s"]
            self._up.append(running)
            took = time.monotonic() - began
            self._ledger.say(f"  {system.name} x{system.workers} is up ({took:.1f} s)")

    def remove(self, test: Callable[[System], bool]) -> None:
        """Stops systems early, so that they take nothing from the others."""
        for running in [one for one in self._up if test(one.system)]:
            running.stop()
            self._up.remove(running)

    def idle_cpu(self, seconds: float = 1.0) -> dict[str, float]:
        """Per cent of a core that each system takes while nothing is asked of it."""
        before = [(running, running.cpu_s()) for running in self._up]
        time.sleep(seconds)
        return {
            f"{running.system.name} x{running.system.workers}": round(
                (running.cpu_s() - was) / seconds * 100, 1
            )
            for running, was in before
        }

    def measure(self, cases: Callable[[System], Sequence[Case]], repeats: int) -> None:
        """Every case of every system, `repeats` times over."""
        for repeat in range(repeats):
            wanted = [(running, case) for running in self._up for case in cases(running.system)]
            order = {case: place for place, case in enumerate(dict.fromkeys(c for _, c in wanted))}
            for running, case in sorted(wanted, key=lambda pair: order[pair[1]]):
                if running in self._up:
                    self._once(running, case, repeat)

    def _once(self, running: Running, case: Case, repeat: int) -> None:
        system = running.system
        known = self._pace.get((*_which(system), case))
        pace = known or self._general[_which(system)] * (
            0.2 if case.concurrency == 1 else case.pace
        )
        try:
            figures = load(running, case, sagas(case, pace, self._seconds))
        except SystemFailed as error:
            self._ledger.fail(error, f"{self._store}, {case.workload} at {case.concurrency}")
            running.stop()
            self._up.remove(running)
            return
        self._pace[*_which(system), case] = figures["sagas_per_s"]
        row = Row(
            system=system.name,
            store=self._store,
            workload=case.workload,
            workers=system.workers,
            concurrency=case.concurrency,
            durable=system.durable,
            steps_per_s=figures["steps_per_s"],
            sagas_per_s=figures["sagas_per_s"],
            p50_ms=figures["p50_ms"],
            p99_ms=figures["p99_ms"],
            rss_mb=round(figures["rss_mb"], 1),
        )
        self._ledger.repeats.append(row)
        facts = {key: value for key, value in asdict(row).items() if key != "durable"}
        self._ledger.details.append(
            {**facts, "repeat": repeat, "sagas": figures["sagas"], "seconds": figures["seconds"]}
        )
        self._ledger.say(
            f"  {repeat + 1} {system.name:<20} x{system.workers} {case.workload:<11} "
            f"{case.concurrency:>5} {row.sagas_per_s:>9.1f} sagas/s {row.steps_per_s:>9.1f} steps/s "
            f"p50 {row.p50_ms:>8.2f} ms  p99 {row.p99_ms:>8.2f} ms  {row.rss_mb:>6.1f} MB"
        )


def _share(system: System, case: Case) -> float:
    # Where it was warmed up with more at once than now, it was faster.
    return 0.2 if case.concurrency == 1 and system.tuned_for != 1 else case.pace


def _which(system: System) -> tuple[str, int, int]:
    return system.name, system.workers, system.tuned_for
