"""The page on consistency links each claim to tests, and those exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import CHECKOUT, blocks, name_of, pages

CLAIMS = CHECKOUT / "docs/explanation/consistency.md"


@pytest.mark.requirement("R42")
def test_each_claim_on_consistency_names_tests_that_exist() -> None:
    text = CLAIMS.read_text(encoding="utf-8")
    assert "one aggregate, or one saga row" in text
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 7
    for claim, tests in rows:
        path = ""
        named = re.findall(r"`([^`]+)`", tests)
        assert named, f"{claim} names no test"
        for name in named:
            path = name.partition("::")[0] if "::" in name else path
            function = name.rpartition("::")[2]
            source = (CHECKOUT / path).read_text(encoding="utf-8")
            assert f"def {function}(" in source, f"{path} has no {function}"


@cache
def all_tests() -> set[str]:
    """The names of all tests, those of the shipped suites included."""
    return {
        name
        for root in ("tests", "src")
        for file in (CHECKOUT / root).rglob("*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_paths_and_tests_that_are_named_exist(page: Path) -> None:
    """`tests/...`, `src/...` and `examples/...` in running text are files; `test_...` are tests."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(text):
        text = text.replace(block.text, "")
    for path in re.findall(r"`((?:tests|src|examples|docs)/[\w./-]+)", text):
        assert (CHECKOUT / path).exists(), f"{path} does not exist"
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in all_tests(), f"there is no test {name}"


def test_page_one_says_every_promise_and_what_is_not_promised() -> None:
    text = (CHECKOUT / "docs/index.md").read_text(encoding="utf-8")
    assert re.findall(r"^- \*\*(G\d+) ", text, re.MULTILINE) == [f"G{n}" for n in range(1, 12)]
    assert "**Not promised:**" in text


def test_links_of_the_readme_lead_somewhere() -> None:
    """MkDocs checks the links of its own pages; nobody else checks these."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    missing = [link for link in links if not (CHECKOUT / link).exists()]
    assert not missing
