from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sagacity.cli import supervisor
from sagacity.cli.exits import Exit
from sagacity.cli.supervisor import Supervisor
from sagacity.worker.config import Settings

pytestmark = pytest.mark.asyncio


async def test_workers_that_crash_at_every_start_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(supervisor, "FAILED_STARTS_MAX", 3)
    (tmp_path / "fatal.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    arguments = ["fatal:service", "--app-dir", str(tmp_path)]
    settings = Settings(store="sqlite+aiosqlite:///unused.db")
    with caplog.at_level(logging.INFO, "sagacity"):
        status = await Supervisor(arguments, settings, 1, {}).run()
    assert status is Exit.FAILED
    statements = [record.getMessage() for record in caplog.records]
    assert statements.count("Worker started") == 3
    assert statements.count("Worker fails at every start") == 1
    ends = [vars(record).get("ended_by") for record in caplog.records]
    assert ends.count("SIGKILL") == 2
