from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagacity.worker.redaction import redacted, scrubbed, secrets_of


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory:", "memory:"),
        ("sqlite+aiosqlite:///shop.db", "sqlite+aiosqlite:///shop.db"),
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:secret@host/0", "redis://:***@host/0"),
        ("redis://secret@host/0", "redis://***@host/0"),
        ("postgresql://user:secret@host:5432/db", "postgresql://user:***@host:5432/db"),
        ("postgresql://user:sec@ret@host/db", "postgresql://user:***@host/db"),
        ("postgresql://user:sec/ret?@host/db", "postgresql://user:***@host/db"),
        ("postgresql://h/db?password=secret&x=1", "postgresql://h/db?password=***&x=1"),
        ("postgresql://h/db?sslmode=require", "postgresql://h/db?sslmode=require"),
        ("unix:///run/redis.sock?db=1&password=secret", "unix:///run/redis.sock?db=1&password=***"),
        ("secret", "***"),
        ("redis:secret@host", "redis:***"),
        ("my secret://host", "***"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert redacted(url) == shown


@given(
    secret=st.text(st.characters(codec="utf-8"), min_size=6).map(lambda s: f"Zq{s}Zq"),
    user=st.sampled_from(["", "shop"]),
)
def test_no_password_shows_however_it_is_written(secret: str, user: str) -> None:
    assert secret not in redacted(f"postgresql://{user}:{secret}@host/db?a=b")


def test_secrets_are_found_as_written_and_as_decoded() -> None:
    urls = ["postgresql://u:p%40ss@h/d", "unix:///s?password=other", "redis://:ab@h", "memory:"]
    assert secrets_of(urls) == ("p%40ss", "other", "p@ss")


def test_secrets_vanish_from_any_text() -> None:
    secrets = secrets_of(["redis://:opensesame@host"])
    assert scrubbed("AUTH opensesame failed", secrets) == "AUTH *** failed"
