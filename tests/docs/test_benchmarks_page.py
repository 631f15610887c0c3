"""The page of the benchmarks and its pictures are what the rows of the last full run say."""

from __future__ import annotations

from benchmarks.report import PAGE, PICTURES, page, pictures
from benchmarks.results import read

RENEW = "is stale; run: python -m benchmarks.report"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(*read()), f"{PAGE.name} {RENEW}"


def test_the_pictures_are_fresh() -> None:
    drawn = pictures(read()[0])
    there = {path.name: path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg")}
    assert set(there) == set(drawn), f"a picture {RENEW}"
    for name, svg in drawn.items():
        assert there[name] == svg, f"{name} {RENEW}"
