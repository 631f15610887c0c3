"""What is made from the program and kept in the documentation is as the program is now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import group_commit, log_statements

RENEW = "is stale; run: python -m tests.docs.generated"


def test_the_catalog_of_log_statements_is_fresh() -> None:
    page = log_statements.PAGE
    assert page.read_text(encoding="utf-8") == log_statements.page(), f"{page.name} {RENEW}"


def test_statements_are_found_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_statements, "SOURCE", tmp_path)
    path = tmp_path / "sagacity" / "odd.py"
    path.parent.mkdir()
    path.write_text(
        "def later(what):\n    log.error(what, extra={'a': 1})\n\n"
        "def f(x):\n    later('Handed over')\n    log.info('Plain')\n"
        "    logger.exception('Old (b=%s, c=%d)', x, x)\n"
        "    log.warning('One' if x else 'Other')\n    math.log(3)\n"
    )
    found = {(one.level, one.statement, one.attributes) for one in log_statements.logged_by(path)}
    assert found == {
        ("error", "Handed over", ("a",)),
        ("info", "Plain", ()),
        ("error", "Old", ("b", "c")),
        ("warning", "One", ()),
        ("warning", "Other", ()),
    }


def test_no_statement_holds_values() -> None:
    """A statement is fixed text, so that it can be searched for; values are attributes."""
    wrong = [one for one in log_statements.catalog() if re.search(r"[%{}\n]", one.statement)]
    assert not wrong


@pytest.mark.asyncio
async def test_the_statements_of_a_commit_are_fresh(postgres_url: str) -> None:
    sent = await group_commit.statements(postgres_url)
    source = group_commit.PAGE.read_text(encoding="utf-8")
    assert source == group_commit.page_with(source, sent), f"{group_commit.PAGE.name} {RENEW}"


@pytest.mark.asyncio
async def test_a_batch_of_any_size_takes_as_many_statements(postgres_url: str) -> None:
    """What the page says: the number of statements does not depend on the number of messages."""
    source = group_commit.PAGE.read_text(encoding="utf-8")
    many = await group_commit.statements(postgres_url, 2000)
    assert f"{len(many) - 1} statements and a COMMIT" in source
    assert len(many) == len(re.findall(r"^-- \d+", source, re.MULTILINE))


@pytest.mark.asyncio
async def test_a_small_batch_is_two_statements_and_no_more(postgres_url: str) -> None:
    few = await group_commit.statements(postgres_url, 4)
    assert len(few) == 2
    assert not any(one.sql.startswith(("BEGIN", "COMMIT")) for one in few)
    assert "two trips" in group_commit.PAGE.read_text(encoding="utf-8")
