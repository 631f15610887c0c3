"""Rows of a run that never was, with round figures."""

from __future__ import annotations

from benchmarks.results import FULL, Row, Run


def row(
    system: str,
    workload: str = "happy",
    steps: float = 300.0,
    *,
    store: str = "postgresql",
    workers: int = 1,
    concurrency: int = 1000,
    p50: float = 10.0,
    p99: float = 20.0,
    durable: str = FULL,
) -> Row:
    return Row(
        system=system,
        store=store,
        workload=workload,
        workers=workers,
        concurrency=concurrency,
        durable=durable,
        steps_per_s=steps,
        sagas_per_s=steps / 3,
        p50_ms=p50,
        p99_ms=p99,
        rss_mb=70.0,
    )


def whole_run() -> tuple[list[Row], Run]:
    rows: list[Row] = []
    for store, speed in (("postgresql", 1.0), ("sqlite", 1.5)):
        for system, most, idle in (("sagacity", 6000, 9), ("bare-parts", 9000, 6)):
            rows.append(
                row(system, "idle", 300, store=store, concurrency=1, p50=idle, p99=2 * idle)
            )
            for concurrency, share in ((10, 0.3), (100, 0.8), (1000, 1.0), (2000, 0.9)):
                steps = most * share * speed
                p50 = concurrency * 3000 / steps
                rows.append(
                    row(
                        system,
                        steps=steps,
                        store=store,
                        concurrency=concurrency,
                        p50=p50,
                        p99=1.4 * p50,
                    )
                )
            for workload, share in (("compensate", 0.9), ("hot", 1.1), ("duplicates", 0.95)):
                rows.append(row(system, workload, most * share * speed, store=store))
            rows.append(
                row(system, "half-load", most / 2, store=store, concurrency=0, p50=12, p99=40)
            )
            for power in range(10):
                size = 2**power
                steps = most * speed * min(1, 0.06 * size**0.6)
                rows.append(
                    row(system, f"batch-{size}", steps, store=store, concurrency=max(10, 4 * size))
                )
        for number, peer in enumerate(("dbos", "python-cqrs", "eventsourcing", "edda")):
            text = "each step's output; commands may be doubled"
            for concurrency, steps in ((10, 150 - 20 * number), (50, 210 - 20 * number)):
                rows.append(
                    row(
                        peer,
                        steps=steps,
                        store=store,
                        concurrency=concurrency,
                        p50=concurrency * 3000 / steps,
                        p99=concurrency * 4500 / steps,
                        durable=text,
                    )
                )
            rows.append(
                row(peer, "idle", 60, store=store, concurrency=1, p50=25, p99=50, durable=text)
            )
    rows.append(row("faststream", steps=220, concurrency=50, p50=680, p99=900))
    rows.append(row("sagacity", steps=8000, workers=2, concurrency=2000, p50=700, p99=950))
    run = Run(
        date="2026-01-02 03:04 UTC",
        form="full",
        seconds=1500,
        machine={"processor": "A | B", "cores": "2"},
        versions={"Python": "3.12.1"},
        settings={"Redis": "one for each system"},
        left_out=["python-cqrs on sqlite: a reason"],
    )
    return rows, run
