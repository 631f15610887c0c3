"""An operator's orders, given on the command line and carried out by a worker process."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sagacity.cli.operator import main
from tests.cli.process import Command, eventually
from tests.cli.services import Ordered
from tests.cli.test_worker import JOINED, SERVICE, publish


@pytest.fixture
def worker(
    redis_url: str, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """A worker with the order ``o1``, whose charge has begun."""
    monkeypatch.setenv("SAGACITY_STORE", sqlite_url)
    environment = {
        "SAGACITY_STORE": sqlite_url,
        "SAGACITY_BUS": redis_url,
        "TEST_NOTES": str(tmp_path),
    }
    with Command(SERVICE, environment=environment) as command:
        command.until(JOINED)
        publish(redis_url, ("m1", Ordered("o1")))
        eventually((tmp_path / "begun-o1").exists, "the charge has begun")
        yield command
        command.signal(signal.SIGTERM)
        assert command.ended() == 0, command.output


def saga(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, arguments, **options)


def story() -> dict[str, Any]:
    result = saga("show", "Order", "o1", "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.output)
    return facts


def status() -> str:
    return str(story()["about"]["status"])


@pytest.mark.usefixtures("worker")
def test_a_cancelled_instance_undoes_gets_stuck_and_is_helped_on(tmp_path: Path) -> None:
    result = saga("cancel", "Order", "o1", "--reason", "customer called", "--dry-run")
    assert "payments.Refund undoes payments.Charge, which may not have happened" in result.output
    assert status() == "running", "a dry run does nothing"

    result = saga("cancel", "Order", "o1", "--reason", "customer called", "--actor", "ada", "-y")
    assert result.exit_code == 0, result.output
    eventually(lambda: status() == "compensating", "a worker took the order")
    (tmp_path / "release-o1").touch()
    eventually(lambda: status() == "stuck", "the refund was refused")
    result = saga("show", "Order", "o1")
    assert "STUCK" in result.output
    assert "FAILED   payments.Refund of payments.Charge: the bank is closed" in result.output

    (tmp_path / "refund-o1").touch()
    result = saga("retry", "Order", "o1", input="y\n")
    assert result.exit_code == 0, result.output
    assert "payments.Refund of payments.Charge is sent again" in result.output
    eventually(lambda: status() == "compensated", "the refund went through")

    steps = [step["message_type"] for step in story()["history"]]
    assert "sagacity.Cancel" in steps
    assert "sagacity.RetryUndo" in steps
    told = saga("show", "Order", "o1").output
    assert "because cancelled: customer called" in told
    assert "asked for by ada" in told
    assert saga("cancel", "Order", "o1", "--reason", "again", "-y").exit_code == 2


@pytest.mark.usefixtures("worker")
def test_a_failed_undo_can_be_waived_with_a_reason(tmp_path: Path) -> None:
    assert saga("cancel", "Order", "o1", "--reason", "x", "--json").exit_code == 0
    eventually(lambda: status() == "compensating", "a worker took the order")
    (tmp_path / "release-o1").touch()
    eventually(lambda: status() == "stuck", "the refund was refused")
    assert saga("waive", "Order", "o1").exit_code == 2, "a reason is asked for"
    result = saga("waive", "Order", "o1", "--reason", "paid in cash", input="n\n")
    assert result.exit_code == 1
    assert status() == "stuck"
    assert saga("waive", "Order", "o1", "--reason", "paid in cash", "-y").exit_code == 0
    eventually(lambda: status() == "compensated", "the refund counts as settled")
    assert "paid in cash" in saga("show", "Order", "o1").output


@pytest.mark.usefixtures("worker")
def test_an_order_that_does_not_apply_is_refused_at_once(tmp_path: Path) -> None:
    result = saga("retry", "Order", "o1", "-y")
    assert result.exit_code == 2
    assert "expected an instance with undo commands that failed, got one that is running" in (
        result.output
    )
    assert saga("cancel", "Order", "o9", "--reason", "x", "-y").exit_code == 1
    (tmp_path / "release-o1").touch()
    eventually(lambda: status() == "completed", "the order was charged")
