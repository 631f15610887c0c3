"""The demo as people run it: it shows everything, checks itself, and leaves nothing running."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from examples.batch_import.processes import ROOT
from tests.servers.postgres import PostgresServer
from tests.waiting import alive, eventually

SMALL = ("--users", "12", "--orders", "40")
ENDS_WITHIN_S = 200.0


@contextmanager
def demo(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The running demo; its temporary files go below `directory`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.batch_import", "demo", *SMALL, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def started_by(process: subprocess.Popen[str]) -> dict[int, str]:
    """Process id -> name of everything that runs below the demo."""
    found: dict[int, str] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            # It may end between being listed and being asked its name.
            with contextlib.suppress(psutil.NoSuchProcess):
                found[child.pid] = child.name()
    return found


def assert_gone(pids: dict[int, str], directory: Path) -> None:
    eventually(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
    assert list(directory.glob("batch-import-*")) == []


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "sqlite":
        return ()
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return ("--store", server.url)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_shows_a_whole_life_and_finds_all_invariants_holding(
    store: tuple[str, ...], tmp_path: Path
) -> None:
    with demo(tmp_path, *store) as process:
        seen: dict[int, str] = {}
        ends = time.monotonic() + ENDS_WITHIN_S
        output = ""
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            seen |= started_by(process)
            assert time.monotonic() < ends, output
        assert process.wait(20) == 0, output

    assert "All invariants hold." in output
    assert len(re.findall(r"^I\d+ +holds", output, re.MULTILINE)) == 14
    assert "compensated" in output
    assert "undo Release" in output
    assert "stateDiagram-v2" in output
    assert "in quarantine" in output
    assert len(seen) >= 9  # redis, three workers, three systems, the sink and the page
    assert_gone(seen, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_everything_it_started(
    tmp_path: Path, number: signal.Signals
) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Import" in line:
                break
        seen = started_by(process)
        assert len(seen) >= 9
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: everybody gets it
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        assert "every process has ended" in output
    assert_gone(seen, tmp_path)


def test_a_killed_demo_ends_everything_it_started(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Import" in line:
                break
        seen = started_by(process)
        process.kill()
        eventually(lambda: not any(alive(pid) for pid in seen), f"the end of {seen}", 40)


def test_a_demo_that_cannot_start_says_why_and_ends_everything(tmp_path: Path) -> None:
    with demo(tmp_path, "--store", "postgresql+asyncpg://nobody@127.0.0.1:1/none") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The demo failed" in output
    assert "Traceback" not in output
    assert list(tmp_path.glob("batch-import-*")) == []
