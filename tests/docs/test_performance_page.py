"""The figures of a long life are those of the last measurement."""

from __future__ import annotations

import json

from benchmarks.endurance import PAGE, RESULTS, page_with, told


def test_the_page_is_fresh() -> None:
    source = PAGE.read_text(encoding="utf-8")
    found = json.loads(RESULTS.read_text())
    assert source == page_with(source, found), f"{PAGE.name} is stale"


def test_what_was_not_measured_is_not_told() -> None:
    assert told({"date": "2026-01-02T03:04+00:00"}) == "Measured on 2026-01-02.\n\n"
    idle = {"seconds": 60.0, "postgresql_transactions": 300, "redis_commands": 1216}
    assert "is 300 transactions on PostgreSQL and 1,216 commands on Redis" in told(
        {"date": "2026-01-02", "idle": idle}
    )
