"""Sagacity, the bare parts and its peers on this machine, one after the other, in one run.

    python -m benchmarks.run [--quick] [--only SYSTEM,..] [--repeats 5] [--out DIR]

Starts its own servers. Prints tables and ratios, and writes ``latest.json`` (with ``--quick``
``quick.json``) and a file of facts beside it. Ends with status 1 where something failed or is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks import cases
from benchmarks.cases import Case, Extent
from benchmarks.measuring import Ledger, Turns
from benchmarks.peering import peer_names, peer_systems
from benchmarks.results import (
    FOLDER,
    LIMIT,
    OURS,
    STORES,
    Found,
    Row,
    Run,
    best_variant,
    medians,
    ratios,
    save,
)
from benchmarks.servers import POSTGRESQL_SETTINGS, Servers
from benchmarks.systems import CHECKOUT, System, bare_parts, sagacity
from benchmarks.terminal import show


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one minute: ours and the bare parts")
    parser.add_argument("--only", default="", metavar="SYSTEM,..", help="measure these alone")
    parser.add_argument("--stores", default=",".join(STORES), metavar="STORE,..")
    parser.add_argument("--repeats", type=int, default=0, help="instead of 5, or 3 with --quick")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    options = parser.parse_args()
    extent = cases.QUICK_FORM if options.quick else cases.FULL_FORM
    if options.repeats:
        extent = replace(
            extent,
            repeats=options.repeats,
            curve_repeats=min(options.repeats, extent.curve_repeats),
        )
    only = {name for name in options.only.split(",") if name}
    stores = options.stores.split(",")
    for given, known in ((only, {OURS, LIMIT, *peer_names()}), (set(stores), set(STORES))):
        if given - known:
            parser.error(
                f"expected some of {', '.join(sorted(known))}, got {', '.join(given - known)}"
            )
    # So that servers and systems are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    session = Session(extent, only, stores)
    rows, run = session()
    name = "quick" if options.quick else "latest"
    save(options.out, name, rows, run)
    show(rows, run, ratios(rows))
    print(f"\nwrote {options.out / name}.json and {options.out / name}-run.json")
    if run.failures:
        print(f"{len(run.failures)} failures; the last: {run.failures[-1]}", file=sys.stderr)
        raise SystemExit(1)


class Session:
    """One run from the first server to the last figure."""

    def __init__(self, extent: Extent, only: set[str], stores: Sequence[str]) -> None:
        self._extent, self._only, self._stores = extent, only, stores
        self._ledger = Ledger(say=self._say)
        self._at = ""
        """The store that is measured now."""
        self._idle_is_measured = False
        """Whether it was, on this store, beside the peers."""
        self._run = Run(date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", form=extent.form)
        self._began = time.monotonic()
        # Whoever reads the figures shall see whether the machine was left alone.
        self._load = f"{os.getloadavg()[0]:.1f}"

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s {text}", flush=True)

    def __call__(self) -> tuple[list[Row], Run]:
        """Measures everything; returns the medians and the facts."""
        run, extent = self._run, self._extent
        peers: list[System] = []
        if extent.peers or self._only - {OURS, LIMIT}:
            peers, missing = peer_systems(self._only, run, self._say)
            self._ledger.failures += missing
        else:
            run.left_out.append("all other frameworks: the quick form does not install them")
        if not extent.batches:
            run.left_out.append(
                "the curve over batch sizes, the sweep over concurrencies, two workers, large payloads, "
                "half load, and on SQLite all but the happy path"
            )
        with Servers() as servers:
            for store in self._stores:
                self._store(servers, store, peers)
        rows = best_variant(medians(self._ledger.repeats), LIMIT)
        run.machine = {**machine(), "load average before the run": self._load}
        run.versions = {**versions(), **run.versions}
        run.settings = {**settings(), **run.settings}
        run.repeats, run.seconds = self._ledger.details, round(time.monotonic() - self._began, 1)
        run.failures = [one.replace(str(CHECKOUT), ".") for one in self._ledger.failures]
        return rows, run

    # ------------------------------------------------------------------------------------- one store

    def _store(self, servers: Servers, store: str, peers: Sequence[System]) -> None:
        extent, self._at, self._idle_is_measured = self._extent, store, False
        self._say(f"{store}: throughput and latency")
        with Turns(servers, store, self._ledger, extent.seconds) as turns:
            turns.add(self._wanted(self._own(store)))
            here = [peer for peer in peers if store in peer.stores]
            self._against_peers(turns, here, sorted({peer.tuned_for for peer in here}))
            turns.measure(self._sweep, extent.repeats)
            turns.measure(self._half, extent.repeats)
        for size in extent.batches:
            self._say(f"{store}: batches of {size}")
            with Turns(servers, store, self._ledger, extent.seconds) as turns:
                turns.add(self._wanted(self._of_batch(size)))
                turns.measure(_only_case(cases.batch(size)), extent.curve_repeats)

    def _against_peers(self, turns: Turns, peers: Sequence[System], levels: Sequence[int]) -> None:
        """Peers are started for a concurrency: all of one, then all of the next."""
        for level in levels:
            first = level == levels[0]
            turns.add([peer for peer in peers if peer.tuned_for == level])
            if first:
                for name, share in turns.idle_cpu().items():
                    self._run.settings[f"{self._at}: {name} when idle"] = f"{share:g} % of a core"

            def at_level(system: System, level: int = level, first: bool = first) -> list[Case]:
                if system.tuned_for:
                    return [cases.IDLE if level == 1 else cases.happy(level)]
                return [cases.IDLE] if first and system.workers == 1 else []

            turns.measure(at_level, self._extent.repeats)
            self._idle_is_measured = True
            turns.remove(lambda system: bool(system.tuned_for))

    def _sweep(self, system: System) -> list[Case]:
        extent = self._extent
        every = [cases.happy(concurrency) for concurrency in extent.concurrencies]
        if system.workers > 1:
            return every[-2:]
        idle = [] if self._idle_is_measured else [cases.IDLE]
        return [*idle, *every, *self._variants()]

    def _variants(self) -> list[Case]:
        extent = self._extent
        if extent.form == "quick" and self._at != STORES[0]:
            return []
        return [
            replace(cases.VARIANTS[name], concurrency=extent.compared) for name in extent.variants
        ]

    def _half(self, system: System) -> list[Case]:
        if system.workers > 1 or not self._extent.half_load:
            return []
        own = [row for row in self._ledger.repeats if row.system == system.name]
        best = Found(medians(own)).fastest(self._at, "happy", lambda row: row.workers == 1)
        return [cases.half_load(best.sagas_per_s)] if best else []

    # ------------------------------------------------------------------------------------ systems

    def _own(self, store: str) -> Iterable[System]:
        for workers in self._extent.workers:
            if workers == 1 or store == "postgresql":
                yield sagacity(workers=workers)
        yield bare_parts(overlap=False)
        yield bare_parts(overlap=True)

    def _of_batch(self, size: int) -> Iterable[System]:
        yield sagacity(batch=size)
        # The variant that was faster on this store.
        own = [row for row in self._ledger.repeats if row.system.startswith(LIMIT)]
        best = Found(medians(own)).fastest(self._at, "happy", bool)
        yield bare_parts(overlap=best is None or best.system.endswith("+overlap"), batch=size)

    def _wanted(self, systems: Iterable[System]) -> list[System]:
        return [s for s in systems if not self._only or s.name.partition("+")[0] in self._only]


def _only_case(case: Case) -> Callable[[System], list[Case]]:
    return lambda _: [case]


# --------------------------------------------------------------------------------------- the facts


def machine() -> dict[str, str]:
    """What it ran on."""
    names = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (names.read_text().splitlines() if names.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """What it ran with."""
    found = {"Python": platform.python_version()}
    for name in ("sagacity", "sqlalchemy", "asyncpg", "redis", "hiredis", "msgspec"):
        found[name] = importlib.metadata.version(name)
    import sqlite3

    found["SQLite"] = sqlite3.sqlite_version
    found["PostgreSQL"] = _answer(_postgres_program(), "--version").split()[2]
    return found


def _postgres_program() -> str:
    from tests.servers.postgres import _find_binaries

    return str(_find_binaries() / "postgres")


def _answer(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip()


def settings() -> dict[str, str]:
    """How the servers are set up."""
    postgres = {"fsync": "on", "synchronous_commit": "on", **POSTGRESQL_SETTINGS}
    return {
        "PostgreSQL": ", ".join(f"{name} = {value}" for name, value in postgres.items()),
        "SQLite": "journal_mode = WAL, synchronous = FULL, unless a framework sets it otherwise",
        "Redis": "one for each system, unix socket, no append-only file",
    }


if __name__ == "__main__":
    main()
