"""One small run from the first server to the last row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import run
from benchmarks.cases import QUICK_FORM
from benchmarks.report import page, pictures
from benchmarks.systems import SystemFailed

SMALL = replace(
    QUICK_FORM,
    form="small",
    repeats=1,
    seconds=0.01,
    concurrencies=(10,),
    compared=10,
    variants=("hot",),
    half_load=True,
    batches=(2,),
    curve_repeats=1,
)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(240)
def test_a_small_run_has_every_row_and_a_page() -> None:
    rows, facts = run.Session(SMALL, {"bare-parts"}, ["sqlite"])()
    assert not facts.failures
    assert {row.system for row in rows} == {"bare-parts"}, "the better variant takes the name"
    assert [(row.workload, row.concurrency) for row in rows] == [
        ("idle", 1),
        ("happy", 10),
        ("hot", 10),
        ("half-load", 0),
        ("batch-2", 10),
    ]
    assert {one["system"] for one in facts.repeats} == {"bare-parts+in turn", "bare-parts+overlap"}
    assert {"processor", "cores", "memory"} <= set(facts.machine)
    assert {"Python", "PostgreSQL", "SQLite", "asyncpg"} <= set(facts.versions)
    assert "| SQLite | 10 |" in page(rows, facts)
    assert "batches.svg" in pictures(rows)


def test_missing_peers_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> tuple[list[Any], list[str]]:
        return [], ["dbos: cannot be installed: no network"]

    monkeypatch.setattr(run, "peer_systems", absent)
    extent = replace(SMALL, peers=True, batches=())
    _, facts = run.Session(extent, set(), [])()
    assert facts.failures == ["dbos: cannot be installed: no network"]


def test_a_failed_run_ends_with_status_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(session: run.Session) -> Any:
        session._ledger.fail(SystemFailed("edda: was not ready"), "sqlite, start")
        session._run.failures = session._ledger.failures
        return [], session._run

    monkeypatch.setattr(run.Session, "__call__", fails)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handler would stay
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        run.main()
    assert "1 failures; the last: sqlite, start: edda: was not ready" in capsys.readouterr().err
    assert (tmp_path / "quick-run.json").exists()
