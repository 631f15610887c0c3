from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import anyio
import pytest

from sagacity import Service
from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.backends.redis import RedisBus
from sagacity.backends.sql import SqlStore
from sagacity.core.errors import BusUnavailable, ConfigurationError, SchemaError, Unavailable
from sagacity.worker.opening import (
    full_store_url,
    is_new,
    open_bus,
    open_store,
    until_reachable,
)


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these packages were not installed."""
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in modules else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


# --------------------------------------------------------------------------------------------- URLs


def test_a_url_names_the_backend(tmp_path: Path) -> None:
    assert isinstance(open_store("memory:"), MemoryStore)
    assert isinstance(open_bus("memory:"), MemoryBus)
    assert isinstance(open_store(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}"), SqlStore)
    assert isinstance(open_store("postgresql+psycopg://u:p@h/d", service=Service("s")), SqlStore)
    assert isinstance(open_bus("redis://h:6379/0"), RedisBus)
    assert not list(tmp_path.iterdir()), "nothing is opened yet"


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("sqlite:///a.db", "sqlite+aiosqlite:///a.db"),
        ("postgres://u@h/d", "postgresql+asyncpg://u@h/d"),
        ("postgresql://u@h/d", "postgresql+asyncpg://u@h/d"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
    ],
)
def test_a_driver_is_chosen_where_none_is_named(url: str, full: str) -> None:
    assert full_store_url(url) == full


def test_the_driver_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "asyncpg")
    assert full_store_url("postgresql://u@h/d") == "postgresql+psycopg://u@h/d"


def test_a_missing_driver_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "asyncpg", "psycopg")
    for url, text in (
        (
            "postgresql+asyncpg://u:hunter2@h/d",
            r"needs asyncpg.*pip install 'sagacity\[postgres\]'",
        ),
        ("postgresql+psycopg://u:hunter2@h/d", r"needs psycopg.*pip install 'sagacity\[psycopg\]'"),
        ("postgresql://u:hunter2@h/d", r"needs asyncpg or psycopg.*sagacity\[postgres\]"),
    ):
        with pytest.raises(ConfigurationError, match=text) as raised:
            open_store(url)
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["mysql://u:hunter2@h/d", "hunter2", "postgresql://u:hunter2@h:port/d", "redis:hunter2@h", ""],
)
def test_a_wrong_url_is_refused_without_showing_its_secret(url: str) -> None:
    for open_it in (open_store, open_bus):
        with pytest.raises(ConfigurationError) as raised:
            open_it(url)
        assert "expected" in str(raised.value)
        assert "hunter2" not in str(raised.value)
        assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_a_bus_url_that_its_client_refuses_is_told_without_its_secret() -> None:
    with pytest.raises(ConfigurationError) as raised:
        open_bus("redis://:hunter2@h:port/0")
    assert "hunter2" not in str(raised.value)


def test_what_is_new_gets_its_tables_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a file.db"
    url = f"sqlite+aiosqlite:///{str(path).replace(' ', '%20')}"
    assert is_new("memory:")
    assert is_new(url)
    path.touch()
    assert is_new(url)
    path.write_bytes(b"SQLite")
    assert not is_new(url)
    assert not is_new("postgresql+asyncpg://u@h/d")


# ------------------------------------------------------------------------------------------ waiting


@pytest.mark.asyncio
async def test_a_server_that_is_away_is_waited_for_with_two_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagacity.worker.opening._FIRST_WAIT_S", 0.001)
    tries = 0

    async def attempt() -> str:
        nonlocal tries
        tries += 1
        if tries < 5:
            raise [Unavailable("away"), BusUnavailable("gone\nsecond line")][tries % 2]
        return "here"

    with caplog.at_level(logging.INFO, "sagacity"):
        assert await until_reachable("bus", "redis://h", attempt, stopping=anyio.Event()) == "here"
    assert [record.getMessage() for record in caplog.records] == [
        "Server unreachable, waiting for it",
        "Server reached",
    ]
    assert vars(caplog.records[0])["error"] == "gone"
    assert vars(caplog.records[1])["attempts"] == 5


@pytest.mark.asyncio
async def test_other_errors_are_raised_as_they_are() -> None:
    async def attempt() -> None:
        raise SchemaError("missing")

    with pytest.raises(SchemaError, match="missing"):
        await until_reachable("store", "x", attempt, stopping=anyio.Event())


@pytest.mark.asyncio
async def test_a_stop_ends_the_wait_even_where_the_attempt_hangs() -> None:
    stopping = anyio.Event()

    async def attempt() -> str:
        stopping.set()
        await anyio.sleep_forever()
        return "never"

    with anyio.fail_after(5):
        assert await until_reachable("store", "x", attempt, stopping=stopping) is None
