"""Rows, medians and ratios of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cases import Case, batch, half_load, happy, sagas
from benchmarks.results import best_variant, medians, ratios, read, save
from tests.benchmarks.figures import row, whole_run

KEYS = {
    *("system", "store", "workload", "workers", "concurrency", "durable"),
    *("steps_per_s", "sagas_per_s", "p50_ms", "p99_ms", "rss_mb"),
}


def test_medians_are_taken_for_each_place_by_itself() -> None:
    repeats = [row("a", steps=steps, p50=steps / 10) for steps in (1, 100, 3)]
    found = medians([*repeats, row("a", steps=7, workers=2), row("b", steps=9)])
    assert [(one.system, one.workers, one.steps_per_s) for one in found] == [
        ("a", 1, 3),
        ("a", 2, 7),
        ("b", 1, 9),
    ]
    assert found[0].p50_ms == 0.3


def test_the_better_variant_takes_the_name() -> None:
    rows = [
        row("limit+in turn", steps=10, p50=1),
        row("limit+overlap", steps=20, p50=2),
        row("limit+in turn", "idle", 10, concurrency=1, p50=1),
        row("limit+overlap", "idle", 20, concurrency=1, p50=2),
        row("other", steps=5),
    ]
    kept = best_variant(rows, "limit")
    assert [(one.system, one.workload, one.steps_per_s) for one in kept] == [
        ("limit", "happy", 20),
        ("limit", "idle", 10),
        ("other", "happy", 5),
    ]


def test_a_run_is_read_as_it_was_saved(tmp_path: Path) -> None:
    rows, run = whole_run()
    run.repeats = [{"system": "sagacity", "repeat": 0}]
    save(tmp_path, "latest", rows, run)
    assert read(tmp_path) == (rows, run)
    listed = json.loads((tmp_path / "latest.json").read_text())
    assert all(set(one) == KEYS for one in listed)


@pytest.mark.parametrize("repeats", [[], [{"repeat": 1}, {"repeat": 2}]])
def test_repeats_may_be_many_or_none(tmp_path: Path, repeats: list[dict[str, object]]) -> None:
    _, run = whole_run()
    run.repeats = repeats
    save(tmp_path, "latest", [], run)
    assert read(tmp_path)[1].repeats == repeats


def test_ratios_are_of_the_rows_they_name() -> None:
    rows, _ = whole_run()
    found = {(one.name, one.store): one for one in ratios(rows)}
    peers = found["steps/s against the best peer", "postgresql"]
    assert (peers.above, peers.below, peers.of) == (
        6000,
        220,
        "sagacity happy at 1000 / faststream happy at 50",
    )
    assert not peers.met
    assert found["steps/s against the bare parts", "sqlite"].value == pytest.approx(2 / 3)
    assert found["steps/s of two workers against one", "postgresql"].value == pytest.approx(4 / 3)
    assert ("steps/s of two workers against one", "sqlite") not in found
    alone = found["p50 of one saga alone against the bare parts", "postgresql"]
    assert (alone.value, alone.met) == (1.5, True)
    half = found["p99 at half load against p50 alone", "postgresql"]
    assert half.value == pytest.approx(40 / 9)


def test_workloads_are_compared_at_the_same_concurrency() -> None:
    rows = [row("sagacity", steps=100), row("sagacity", steps=900, concurrency=2000)]
    rows.append(row("sagacity", "hot", 50))
    assert [one.value for one in ratios(rows) if "hot" in one.name] == [0.5]


def test_a_run_with_nothing_has_no_ratios() -> None:
    assert ratios([]) == []


@pytest.mark.parametrize(
    ("case", "pace", "count"),
    [
        (happy(1000), 900.0, 2500),  # the loop is filled more than twice
        (happy(1000), 250.0, 1500),  # what is slow: not quite
        (happy(200), 5.0, 200),  # but once
        (happy(10), 3000.0, 6000),
        (Case("idle", 1), 5.0, 20),
        (half_load(1000.0), 9.0, 2000),
        (batch(512), 1000.0, 5000),
    ],
)
def test_a_load_is_as_long_as_it_has_to_be(case: Case, pace: float, count: int) -> None:
    assert sagas(case, pace, 2.0) == count
