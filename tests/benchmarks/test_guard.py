"""What the regression guard makes of counts; `make guard` counts, and has a control of its own."""

import json

from benchmarks.guard import KEPT, MARGIN, PARTS, slower_parts, totals


def test_a_part_may_cost_a_little_more_and_not_much_more() -> None:
    kept = {"core": 4.0, "codec": 1.0}
    assert slower_parts({"core": 4.0 * (1 + MARGIN) - 0.01, "codec": 0.5}, kept) == []
    [line] = slower_parts({"core": 4.0 * (1 + MARGIN) + 0.01, "codec": 1.0}, kept)
    assert line.startswith("core: 4.33 references per message, expected at most 4.32 (+8.")


def test_the_dumps_of_a_file_are_told_apart() -> None:
    text = (
        "version: 1\npart: 1\nsummary: 10\ntotals: 1200\npart: 2\ntotals: 300\npart: 3\ntotals: 0\n"
    )
    assert totals(text) == [1200, 300]


def test_every_part_has_a_kept_figure() -> None:
    kept = json.loads(KEPT.read_text())
    assert sorted(kept) == sorted(PARTS)
    assert all(cost > 0 for cost in kept.values())
