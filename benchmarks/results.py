"""What a run found: rows for programs, facts about the run, and the ratios that matter."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
OURS, LIMIT = "sagacity", "bare-parts"
STORES = ("postgresql", "sqlite")
FULL = "state, inbox, outbox and history with each step"
"""What ours commits; a row whose text does not begin so is marked as committing less."""


@dataclass(frozen=True)
class Row:
    """The medians of one (system, store, workload, workers, concurrency).

    `concurrency` is how many sagas are under way; 0 for an open loop, which has no such number.
    `durable` says what is committed at each step.
    """

    system: str
    store: str
    workload: str
    workers: int
    concurrency: int
    durable: str
    steps_per_s: float
    sagas_per_s: float
    p50_ms: float
    p99_ms: float
    rss_mb: float

    @property
    def place(self) -> tuple[str, str, str, int, int]:
        """What is measured, without what was found."""
        return self.system, self.store, self.workload, self.workers, self.concurrency


@dataclass
class Run:
    """Everything beside the rows: where, when, with what, each repeat, and what went wrong."""

    date: str
    form: str
    seconds: float = 0.0
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    repeats: list[dict[str, Any]] = field(default_factory=list)


MEASURED = ("steps_per_s", "sagas_per_s", "p50_ms", "p99_ms")


def median_of(repeats: Sequence[Row]) -> Row:
    """One row of several of the same place: medians, and the highest memory."""
    first = repeats[0]
    medians = {
        name: round(statistics.median(getattr(one, name) for one in repeats), 3)
        for name in MEASURED
    }
    return replace(first, **medians, rss_mb=round(max(one.rss_mb for one in repeats), 1))


def medians(repeats: Iterable[Row]) -> list[Row]:
    """The medians of each place, in the order in which the places were first seen."""
    places: dict[tuple[str, str, str, int, int], list[Row]] = {}
    for one in repeats:
        places.setdefault(one.place, []).append(one)
    return [median_of(some) for some in places.values()]


def best_variant(rows: Iterable[Row], system: str) -> list[Row]:
    """Rows with the variants of a system ("name+variant") merged: the better one takes the name.

    Where single sagas or a given rate are measured, lower latency is better, else higher throughput.
    """
    kept: dict[tuple[str, str, str, int, int], Row] = {}
    for row in rows:
        name, _, variant = row.system.partition("+")
        named = replace(row, system=name) if name == system and variant else row
        there = kept.get(named.place)
        if there is None or _better(named, there):
            kept[named.place] = named
    return list(kept.values())


def _better(row: Row, than: Row) -> bool:
    if row.workload in {"idle", "half-load"} or row.concurrency == 1:
        return row.p50_ms < than.p50_ms
    return row.steps_per_s > than.steps_per_s


# ------------------------------------------------------------------------------------------- files


def save(folder: Path, name: str, rows: Sequence[Row], run: Run) -> None:
    """Writes ``{name}.json``, the rows, and ``{name}-run.json``, the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = ",\n ".join(json.dumps(asdict(row)) for row in rows)
    (folder / f"{name}.json").write_text(f"[{listed}]\n", encoding="utf-8")
    facts = asdict(run)
    repeats = ",\n  ".join(json.dumps(one) for one in facts.pop("repeats"))
    head = json.dumps(facts, indent=1, ensure_ascii=False).removesuffix("\n}")
    (folder / f"{name}-run.json").write_text(
        f'{head},\n "repeats": [\n  {repeats}\n ]\n}}\n', encoding="utf-8"
    )


def read(folder: Path = FOLDER, name: str = "latest") -> tuple[list[Row], Run]:
    """The rows and the facts of a run. Raises FileNotFoundError where there is none."""
    rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    run = json.loads((folder / f"{name}-run.json").read_text(encoding="utf-8"))
    return [Row(**row) for row in rows], Run(**run)


# ------------------------------------------------------------------------------------------ ratios


@dataclass(frozen=True)
class Ratio:
    """Two figures of one run, what they are, and the ratio that was asked for."""

    name: str
    store: str
    above: float
    below: float
    of: str
    target: str
    met: bool

    @property
    def value(self) -> float:
        """The ratio."""
        return self.above / self.below if self.below else float("inf")


def is_peer(row: Row) -> bool:
    """True for the row of another framework."""
    return row.system not in {OURS, LIMIT}


def commits_less(row: Row) -> bool:
    """True where not all of state, inbox, outbox and history is committed at each step."""
    return not row.durable.startswith(FULL)


class Found:
    """The rows of a run, to look things up in."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def where(self, store: str, workload: str, test: Callable[[Row], bool] = bool) -> list[Row]:
        """Rows of a store and a workload."""
        return [
            row
            for row in self.rows
            if row.store == store and row.workload == workload and test(row)
        ]

    def fastest(self, store: str, workload: str, test: Callable[[Row], bool]) -> Row | None:
        """The row with most steps a second."""
        return max(self.where(store, workload, test), key=lambda row: row.steps_per_s, default=None)

    def quickest(self, store: str, workload: str, test: Callable[[Row], bool]) -> Row | None:
        """The row with the lowest median latency."""
        return min(self.where(store, workload, test), key=lambda row: row.p50_ms, default=None)


def ours(row: Row) -> bool:
    """One worker process of ours."""
    return row.system == OURS and row.workers == 1


def _ours_at(concurrency: int) -> Callable[[Row], bool]:
    return lambda row: ours(row) and row.concurrency == concurrency


def _limit(row: Row) -> bool:
    return row.system == LIMIT


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The ratios that matter, of those for which there are rows."""
    found = Found(rows)
    out: list[Ratio] = []

    def add(
        name: str,
        store: str,
        above: Row | None,
        below: Row | None,
        least: float,
        *,
        most: bool = False,
    ) -> None:
        """`least` is the target; with `most` it is the most that the ratio may be."""
        if above is None or below is None:
            return
        latency = most
        a, b = (above.p50_ms, below.p50_ms) if latency else (above.steps_per_s, below.steps_per_s)
        if name.startswith("p99"):
            a = above.p99_ms
        value = a / b if b else float("inf")
        met = value <= least if most else value >= least
        of = f"{_short(above)} / {_short(below)}"
        target = f"{'at most' if most else 'at least'} {least:g}"
        out.append(Ratio(name, store, a, b, of, target, met))

    for store in STORES:
        happy = found.fastest(store, "happy", ours)
        peer = found.fastest(store, "happy", is_peer)
        add("steps/s against the best peer", store, happy, peer, 30)
        limit = found.fastest(store, "happy", _limit)
        add("steps/s against the bare parts", store, happy, limit, 0.6)
        for workload, least, name in (
            ("compensate", 0.5, "steps/s compensating against happy"),
            ("hot", 0.9, "steps/s of one hot saga against happy"),
            ("duplicates", 0.9, "steps/s with 10 % duplicates against happy"),
        ):
            variant = found.fastest(store, workload, ours)
            same = found.fastest(store, "happy", _ours_at(variant.concurrency if variant else 0))
            add(name, store, variant, same, least)
        two = found.fastest(store, "happy", lambda row: row.system == OURS and row.workers == 2)
        add("steps/s of two workers against one", store, two, happy, 1)
        idle = found.quickest(store, "idle", ours)
        bare_idle = found.quickest(store, "idle", _limit)
        add("p50 of one saga alone against the bare parts", store, idle, bare_idle, 1.5, most=True)
        peers = found.quickest(store, "idle", is_peer)
        add("p50 of one saga alone against the best peer", store, idle, peers, 1, most=True)
        half = found.quickest(store, "half-load", ours)
        add("p99 at half load against p50 alone", store, half, idle, 10, most=True)
    return out


def _short(row: Row) -> str:
    workers = f" x{row.workers}" if row.workers > 1 else ""
    at = f" at {row.concurrency}" if row.concurrency > 1 else ""
    return f"{row.system}{workers} {row.workload}{at}"
