"""Writes docs/explanation/benchmarks.md and its pictures from the rows of the last full run.

    python -m benchmarks.report [--from DIR]

Every figure in the page comes from ``latest.json`` and ``latest-run.json``; only the prose is here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.charts import COLOURS, Line, chart
from benchmarks.results import (
    FOLDER,
    LIMIT,
    OURS,
    STORES,
    Found,
    Ratio,
    Row,
    Run,
    commits_less,
    ratios,
    read,
)

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "explanation" / "benchmarks.md"
PICTURES = DOCS / "assets" / "benchmarks"
NAMES = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
MARK = "¹"

INTRODUCTION = """\
# Benchmarks

How many durable steps a second one worker process takes, against other frameworks and against the
*bare parts*: a program without any framework that writes the same rows and the same stream entries by
the drivers themselves. The first says what group commit is worth, the second what the framework costs.

All of it was measured in one run on one machine, and this page was written from the rows of that run.
Your machine gives other figures; the ratios are what carries over.
"""

WORKLOAD = """\
## The workload

An *import saga* as in the examples: three events come in, two commands go out, and it takes three durable
steps. Events and commands travel over Redis Streams. Participants answer at once; one lean process plays all
of them, starts the sagas and sees from outside when they are over. Messages carry 200 bytes of
payload where nothing else is said.

```text
ImportRequested -> AuthenticateUser -> UserAuthenticated -> GenerateAccount -> AccountGenerated
```

A closed loop keeps a fixed number of sagas under way. A latency is that of a whole saga, from its
first event to the end of its last step: three steps, and what the participants and the streams
between them take.
"""

LIMIT_TEXT = """\
The bare parts are asyncpg or sqlite3, hiredis on one socket, and msgspec, in one process: for each batch one
statement that reads and one that writes (on SQLite one for each table), one write to Redis, and a
dictionary as state machine. They give the same durability and nothing else: no retries, no timeouts, no second worker, no safe restart, one workload known
beforehand. They are measured with one batch at a time and with two under way, and the better one counts.
"""

DURABILITY = """\
## What is committed

PostgreSQL syncs every commit to disk, for every system. On SQLite ours and the bare parts do
(`synchronous = FULL`), and each framework as it sets its connections. What is in the commit of a step differs:
"""

NOT_MEASURED = """\
## What is not measured

- **Other machines.** Everything shares the cores of one: servers, load and the system under test. Each
  would be faster with cores of its own, and the cheapest code gains least from them.
- **A network.** All connections are local. With a round trip of a millisecond the systems that make one
  for each message lose far more than those that make one for each batch.
- **Handlers that take time.** Participants answer at once; in real life they are what is waited for.
- **Redis on disk.** It keeps nothing here, for every system. A step is durable in SQL before anything is
  acknowledged, so none is lost with Redis; messages that others publish may be.
- **Failures.** How fast a system is again after a crash is a matter of its tests, not of this page.
- **Years.** A run fills tables with some hundred thousand sagas, not with hundreds of millions.
"""

HOW = """\
## Run it yourself

```console
$ make bench         # everything, some 20 minutes; peers are installed in environments of their own
$ make bench-quick   # ours and the bare parts, about one minute
```

It needs no server: it starts its own and removes them. The rows are in `benchmarks/results/latest.json`,
every single repeat is in `latest-run.json` beside it, and `benchmarks/README.md` says how a system is
added. Systems take turns, repeat by repeat, so that whatever the machine does meanwhile, it does to all
of them; figures are medians.
"""


def page(rows: Sequence[Row], run: Run) -> str:
    """The page as Markdown."""
    found = ratios(rows)
    parts = [INTRODUCTION, _when(run), _ratios(found), _in_the_way(found, Found(rows)), WORKLOAD]
    parts += [_store(rows, store) for store in STORES if Found(rows).where(store, "happy")]
    parts += [
        _variants(run),
        _workloads(rows),
        _batches(rows),
        _durability(rows),
        _settings(run),
        HOW,
        NOT_MEASURED,
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _when(run: Run) -> str:
    what = "the full form" if run.form == "full" else "the quick form, which says little"
    text = (
        f"Measured on {run.date}, {what}: {run.machine.get('cores', '?')} cores of "
        f"{run.machine.get('processor', 'an unknown processor')}, {run.machine.get('memory', '?')} of "
        "memory.\n"
    )
    if run.failures:
        listed = "\n".join(f"- `{one.splitlines()[0]}`" for one in run.failures)
        text += f"\nThis run was not complete. What failed:\n\n{listed}\n"
    return text


def _ratios(found: Sequence[Ratio]) -> str:
    rows = [
        (one.name, NAMES[one.store], f"{one.value:.2f}", one.target, "yes" if one.met else "**no**")
        for one in found
    ]
    return "## The ratios\n\n" + table(("", "Store", "Ratio", "Target", "Met"), rows, right={2})


HALF_LOAD = (
    "at half of its capacity a worker takes small batches, which cost it more for each message than large "
    "ones, so its one interpreter is far more than half busy. What it would take, and by how much: see "
    "[Where the time goes](performance.md#on-sqlite)."
)


def _in_the_way(found: Sequence[Ratio], rows: Found) -> str:
    """For each target that was missed: what stands in the way, by the figures of this run."""
    lines: list[str] = []
    for one in found:
        if one.met:
            continue
        text = "not looked into."
        limit = rows.fastest(one.store, "happy", lambda row: row.system == LIMIT)
        if "best peer" in one.name and one.name.startswith("steps/s") and limit:
            wanted = 30 * one.below
            text = (
                f"30 times {_rounded(one.below)} steps/s are {_rounded(wanted)}. The bare parts, with no "
                f"framework at all, do {_rounded(limit.steps_per_s)} on this machine, "
                f"{limit.steps_per_s / one.below:.1f} times the peer: the target asks for "
                f"{wanted / limit.steps_per_s:.2f} times the limit. What it would take: fewer rows or bytes for "
                "a step, or a machine on which the servers have cores of their own."
            )
        elif one.name.startswith("p99"):
            text = HALF_LOAD
        elif one.name.startswith("p50 of one saga alone"):
            text = _lone(one, rows)
        lines.append(f"- *{one.name}*, {NAMES[one.store]} ({one.value:.2f}, {one.target}): {text}")
    if not lines:
        return ""
    return "## What stands in the way\n\n" + "\n".join(lines)


def _lone(one: Ratio, rows: Found) -> str:
    """What a lone saga takes above what it is compared with."""
    more = (one.above - one.below) / 3
    other = rows.quickest("postgresql", "idle", lambda row: row.system == OURS)
    bare = rows.quickest("postgresql", "idle", lambda row: row.system == LIMIT)
    text = f"a step of ours takes {more:.1f} ms more"
    if other and bare:
        text += f", against the bare parts on PostgreSQL {(other.p50_ms - bare.p50_ms) / 3:.1f} ms"
    return (
        f"{text}. That is an event loop that stays free for others: two trips to the thread that SQLite runs "
        "in, and reading, publishing and acknowledging side by side. What it is compared with does one thing "
        "after the other in one thread and attends to nothing else meanwhile. What it would take: a worker "
        "that blocks, for SQLite alone; see [Where the time goes](performance.md#on-sqlite)."
    )


# ------------------------------------------------------------------------------------------- stores


def _store(rows: Sequence[Row], store: str) -> str:
    found, name = Found(rows), NAMES[store]
    text = f"## {name}\n\n"
    for picture, alt in _pictures_of(rows, store):
        text += f"![{alt}](../assets/benchmarks/{picture})\n\n"
    best = [
        row
        for system in _systems(rows)
        for workers in (1, 2)
        if (row := found.fastest(store, "happy", _is(system, workers)))
    ]
    text += f"Each system at the concurrency where it is fastest, on {name}:\n\n"
    text += _figures(best)
    idle = [
        row
        for s in _systems(rows)
        for row in found.where(store, "idle", _is(s))
        if row.workers == 1
    ]
    if idle:
        text += "\nOne saga alone, three hops from end to end:\n\n" + _figures(idle)
    half = [row for s in _systems(rows) for row in found.where(store, "half-load", _is(s))]
    if half:
        text += (
            "\nAn open loop, sagas started evenly at half the rate of the first table:\n\n"
            + _figures(half)
        )
    if any(commits_less(row) for row in best):
        text += f"\n{MARK} Commits less with a step; see [what is committed](#what-is-committed).\n"
    if any(row.system == LIMIT for row in best):
        text += f"\n{LIMIT_TEXT}" if store == STORES[0] else ""
    return text


def _variants(run: Run) -> str:
    """The bare parts with one batch at a time and with two, from the repeats."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for one in run.repeats:
        name, _, variant = one["system"].partition("+")
        if name == LIMIT and one["workload"] == "happy":
            place = found.setdefault((one["store"], one["concurrency"]), {})
            place.setdefault(variant, []).append(one["steps_per_s"])
    if not found:
        return ""
    names = sorted({name for variants in found.values() for name in variants})
    rows = [
        (
            NAMES[store],
            f"{concurrency:,}",
            *(_rounded(statistics.median(variants.get(name, [0]))) for name in names),
        )
        for (store, concurrency), variants in sorted(found.items())
    ]
    return (
        "## Two limits\n\nThe bare parts with one batch after the other, and with one at the database while "
        "another is read, decided and published; steps a second:\n\n"
        + table(("Store", "At once", *names), rows, right=set(range(1, 2 + len(names))))
    )


def _figures(rows: Iterable[Row]) -> str:
    return table(
        ("System", "At once", "Steps/s", "Sagas/s", "p50 ms", "p99 ms", "Memory MB"),
        [
            (
                _shown(row),
                f"{row.concurrency:,}" if row.concurrency else "open loop",
                _rounded(row.steps_per_s),
                _rounded(row.sagas_per_s),
                _rounded(row.p50_ms),
                _rounded(row.p99_ms),
                _rounded(row.rss_mb),
            )
            for row in rows
        ],
        right={1, 2, 3, 4, 5, 6},
    )


def _shown(row: Row) -> str:
    name = f"**{row.system}**" if row.system == OURS else row.system
    workers = f", {row.workers} workers" if row.workers > 1 else ""
    return f"{name}{workers}{' ' + MARK if commits_less(row) else ''}"


def _is(system: str, workers: int = 0) -> Callable[[Row], bool]:
    return lambda row: row.system == system and workers in {0, row.workers}


def _systems(rows: Sequence[Row]) -> list[str]:
    there = {row.system for row in rows}
    known = [name for name in COLOURS if name in there]
    return [*known, *sorted(there - set(known))]


# ---------------------------------------------------------------------------------------- workloads

KINDS = {
    "happy": "happy path",
    "compensate": "a third command is refused, two are undone: six steps",
    "hot": "all events are for one saga",
    "duplicates": "one message in ten arrives twice",
    "payload-2k": "payloads of 2 KiB",
    "payload-20k": "payloads of 20 KiB",
}


def _workloads(rows: Sequence[Row]) -> str:
    found = Found(rows)
    lines: list[tuple[str, ...]] = []
    for store in STORES:
        for workload, text in KINDS.items():
            mine = found.fastest(store, workload, _is(OURS, 1))
            bare = found.fastest(store, workload, _is(LIMIT))
            if mine is None:
                continue
            share = f"{mine.steps_per_s / bare.steps_per_s:.2f}" if bare else ""
            limit = _rounded(bare.steps_per_s) if bare else ""
            steps = _rounded(mine.steps_per_s)
            lines.append((NAMES[store], text, steps, limit, share, _rounded(mine.p99_ms)))
    if not lines:
        return ""
    head = ("Store", "Workload", "Ours, steps/s", "Bare parts", "Share", "Ours, p99 ms")
    return (
        "## Workloads\n\nOne worker process. A step is a step: a saga that compensates takes six.\n\n"
        + table(head, lines, right={2, 3, 4, 5})
    )


def _batches(rows: Sequence[Row]) -> str:
    lines = [
        (
            NAMES[store],
            str(size),
            *(_rounded(row.steps_per_s) if row else "" for row in (mine, bare)),
            f"{mine.steps_per_s / bare.steps_per_s:.2f}" if mine and bare else "",
            _rounded(mine.p50_ms) if mine else "",
        )
        for store, size, mine, bare in _batch_rows(rows)
    ]
    if not lines:
        return ""
    head = ("Store", "Batch", "Ours, steps/s", "Bare parts", "Share", "Ours, p50 ms")
    return (
        "## What a batch is worth\n\nThe same with a limit on how many messages share a transaction, and "
        "four times as many sagas under way. This is what [group commit](group-commit.md) is about.\n\n"
        "![Steps per second against the size of a batch](../assets/benchmarks/batches.svg)\n\n"
        + table(head, lines, right={1, 2, 3, 4, 5})
    )


def _batch_rows(rows: Sequence[Row]) -> list[tuple[str, int, Row | None, Row | None]]:
    found = Found(rows)
    sizes = sorted(
        {int(row.workload.removeprefix("batch-")) for row in rows if "batch-" in row.workload}
    )
    return [
        (store, size, mine, bare)
        for store in STORES
        for size in sizes
        for mine in [found.fastest(store, f"batch-{size}", _is(OURS))]
        for bare in [found.fastest(store, f"batch-{size}", _is(LIMIT))]
        if mine or bare
    ]


# ------------------------------------------------------------------------------------------- facts


def _durability(rows: Sequence[Row]) -> str:
    texts = {row.system: row.durable for row in rows}
    lines = [
        (f"{name}{' ' + MARK if commits_less(_first(rows, name)) else ''}", texts[name])
        for name in _systems(rows)
    ]
    return f"{DURABILITY}\n" + table(("System", "Committed"), lines)


def _first(rows: Sequence[Row], system: str) -> Row:
    return next(row for row in rows if row.system == system)


def _settings(run: Run) -> str:
    facts = {**run.machine, **run.settings}
    text = "## Machine, versions, settings\n\n"
    text += table(("What", "Value"), list(facts.items()))
    text += "\n" + ", ".join(f"{name} {version}" for name, version in run.versions.items()) + ".\n"
    if run.left_out:
        text += "\nLeft out:\n\n" + "\n".join(f"- {one}" for one in run.left_out) + "\n"
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: set[int] | None = None) -> str:
    """A Markdown table; the columns in `right` are aligned to the right."""
    marks = ["---:" if place in (right or set()) else "---" for place in range(len(head))]
    lines = [head, marks, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _rounded(value: float) -> str:
    """Three digits that mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ----------------------------------------------------------------------------------------- pictures


def _pictures_of(rows: Sequence[Row], store: str) -> list[tuple[str, str]]:
    del rows
    name = NAMES[store]
    return [
        (f"{store}-throughput.svg", f"Steps per second against concurrency on {name}"),
        (f"{store}-latency.svg", f"Latency against concurrency on {name}"),
    ]


def pictures(rows: Sequence[Row]) -> dict[str, str]:
    """File name -> SVG."""
    drawn: dict[str, str] = {}
    for store in STORES:
        here = [row for row in rows if row.store == store]
        throughput: list[Line] = []
        latency: list[Line] = []
        for system in _systems(here):
            for workers in (1, 2):
                some = _curve(here, system, workers)
                if not some:
                    continue
                label = f"{system}, {workers} workers" if workers > 1 else system
                bold = system == OURS
                points = tuple((row.concurrency, row.steps_per_s) for row in some)
                throughput.append(Line(system, label, points, workers > 1, bold))
                if workers == 1:
                    p50 = tuple((row.concurrency, row.p50_ms) for row in some)
                    p99 = tuple((row.concurrency, row.p99_ms) for row in some)
                    latency.append(Line(system, f"{label}, p50", p50, bold=bold))
                    latency.append(Line(system, f"{label}, p99", p99, dashed=True, bold=bold))
        if throughput:
            title, x = f"Durable steps per second, {NAMES[store]}", "sagas under way"
            drawn[f"{store}-throughput.svg"] = chart(title, x, "steps/s", throughput)
            title = f"Latency of a whole saga, {NAMES[store]}"
            drawn[f"{store}-latency.svg"] = chart(title, x, "milliseconds", latency)
    lines = []
    for store in STORES:
        found = [each for each in _batch_rows(rows) if each[0] == store]
        for system, place in ((OURS, 2), (LIMIT, 3)):
            points = tuple((each[1], row.steps_per_s) for each in found if (row := each[place]))  # type: ignore[union-attr]
            if points:
                name = f"{system}, {NAMES[store]}"
                lines.append(Line(system, name, points, store != STORES[0], system == OURS))
    if lines:
        title = "Durable steps per second by batch size"
        drawn["batches.svg"] = chart(title, "messages per transaction, at most", "steps/s", lines)
    return drawn


def _curve(rows: Sequence[Row], system: str, workers: int) -> list[Row]:
    wanted = [row for row in rows if row.system == system and row.workers == workers]
    return [row for row in wanted if row.workload in {"happy", "idle"} and row.concurrency]


def main() -> None:
    """Writes the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--from", dest="folder", type=Path, default=FOLDER, metavar="DIR")
    rows, run = read(parser.parse_args().folder)
    PAGE.write_text(page(rows, run), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures(rows).items():
        (PICTURES / name).write_text(svg, encoding="utf-8")
    print(f"wrote {PAGE.name} and {len(pictures(rows))} pictures")


if __name__ == "__main__":
    main()
