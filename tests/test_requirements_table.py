"""The page of requirements is up to date, and its maker finds markers wherever they may stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.requirements_table import PAGE, MarkerError, coverage, page, rows_of_tests

MARKED = """
import pytest
pytestmark = [pytest.mark.requirement("R1"), pytest.mark.slow]

@pytest.mark.requirement("R2", "R3")
def test_plain(): ...

class TestGroup:
    @pytest.mark.outcome("O4")
    async def test_inside(self): ...

@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.requirement("R5"))])
def test_one_parameter(n): ...

@pytest.mark.requirement("R6")
def not_a_test(): ...
"""


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "stale page: run `make requirements`"


def test_markers_are_found_on_modules_classes_functions_and_parameters() -> None:
    assert sorted(rows_of_tests(MARKED, "test_marked.py")) == [
        ("O4", "TestGroup::test_inside"),
        ("R1", "TestGroup::test_inside"),
        ("R1", "test_one_parameter"),
        ("R1", "test_plain"),
        ("R2", "test_plain"),
        ("R3", "test_plain"),
        ("R5", "test_one_parameter"),
    ]


def test_marker_that_names_no_row_is_refused(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_marked.py").write_text(MARKED)
    rows = {"R1", "R2", "R3", "O4"}
    with pytest.raises(MarkerError, match="test_one_parameter names the row R5"):
        coverage(tests, rows)
    assert coverage(tests, {*rows, "R5"})["R2"] == {"tests/test_marked.py": ["test_plain"]}


def test_marker_with_a_computed_row_is_refused() -> None:
    source = "@pytest.mark.requirement(ROW)\ndef test_it(): ..."
    with pytest.raises(MarkerError, match=r"test_x.py:1: requirement\(\) expects plain strings"):
        list(rows_of_tests(source, "test_x.py"))
