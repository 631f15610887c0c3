"""The page and the pictures of the benchmarks, from rows that were made up."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from benchmarks.charts import HEIGHT, WIDTH, Line, chart
from benchmarks.report import MARK, page, pictures, table
from benchmarks.results import Row
from benchmarks.terminal import lines, ratio_lines
from tests.benchmarks.figures import row, whole_run

SVG = "{http://www.w3.org/2000/svg}"


def test_the_page_shows_what_the_rows_say() -> None:
    rows, run = whole_run()
    text = page(rows, run)
    assert "| **sagacity** | 1,000 | 6,000 | 2,000 | 500 | 700 | 70.0 |" in text
    assert "| **sagacity**, 2 workers | 2,000 | 8,000 |" in text
    assert f"| dbos {MARK} | 50 | 210 |" in text
    assert "| faststream | 50 | 220 |" in text, "what commits as much is not marked"
    assert "A \\| B" in text
    assert "python-cqrs on sqlite: a reason" in text
    for heading in (
        "## PostgreSQL",
        "## SQLite",
        "## What a batch is worth",
        "## What is committed",
    ):
        assert heading in text


def test_both_limits_are_shown() -> None:
    rows, run = whole_run()
    assert "## Two limits" not in page(rows, run)
    for variant, figures in (("in turn", (1000, 3000, 2000)), ("overlap", (7000, 9000, 8000))):
        for steps in figures:
            run.repeats.append(
                {
                    "system": f"bare-parts+{variant}",
                    "store": "sqlite",
                    "workload": "happy",
                    "concurrency": 1000,
                    "steps_per_s": steps,
                }
            )
    text = page(rows, run)
    assert "| Store | At once | in turn | overlap |" in text
    assert "| SQLite | 1,000 | 2,000 | 8,000 |" in text


def test_failures_are_told_first() -> None:
    rows, run = whole_run()
    run.failures = ["sqlite, start: edda: was not ready\n    a log line"]
    text = page(rows, run)
    assert "`sqlite, start: edda: was not ready`" in text
    assert "a log line" not in text
    assert text.index("was not ready") < text.index("## The ratios")


def test_a_run_of_one_store_has_a_page() -> None:
    rows, run = whole_run()
    text = page([one for one in rows if one.store == "sqlite"], run)
    assert "## PostgreSQL" not in text
    assert "## SQLite" in text


def test_every_picture_of_the_page_is_drawn() -> None:
    rows, run = whole_run()
    named = set(re.findall(r"assets/benchmarks/([\w-]+\.svg)", page(rows, run)))
    assert named == set(pictures(rows))


@pytest.mark.parametrize("name", sorted(pictures(whole_run()[0])))
def test_pictures_are_svg_with_everything_inside(name: str) -> None:
    root = ET.fromstring(pictures(whole_run()[0])[name])
    assert root.tag == f"{SVG}svg"
    for circle in root.iter(f"{SVG}circle"):
        assert 0 < float(circle.attrib["cx"]) < WIDTH
        assert 0 < float(circle.attrib["cy"]) < HEIGHT
    texts = [one.text or "" for one in root.iter(f"{SVG}text")]
    assert any("sagacity" in one for one in texts)


def test_axes_are_logarithmic() -> None:
    svg = chart("t", "x", "y", [Line("dbos", "dbos", ((1, 10), (10, 100), (100, 1000)))])
    places = [
        (float(one.attrib["cx"]), float(one.attrib["cy"]))
        for one in ET.fromstring(svg).iter(f"{SVG}circle")
    ]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y3, "more is higher"


def test_what_has_no_logarithm_is_left_out() -> None:
    svg = chart("t", "x", "y", [Line("dbos", "a & b", ((0, 5), (5, 5)))])
    assert len(list(ET.fromstring(svg).iter(f"{SVG}circle"))) == 1
    with pytest.raises(ValueError, match="expected points"):
        chart("t", "x", "y", [Line("dbos", "dbos", ((0, 5),))])


def test_tables_are_markdown() -> None:
    assert (
        table(("a", "b"), [("1", "x|y")], right={0}) == "| a | b |\n| ---: | --- |\n| 1 | x\\|y |\n"
    )


def test_the_terminal_marks_what_commits_less() -> None:
    rows: list[Row] = [row("dbos", durable="each step's output"), row("faststream")]
    assert [cells[0] for cells in lines(rows)] == ["dbos *", "faststream"]
    assert ratio_lines([]) == []
