"""`saga dev` as a real process."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil

from tests.cli.process import Command, eventually
from tests.cli.services import Ordered
from tests.cli.test_worker import JOINED, SERVICE, publish


def test_a_service_runs_with_servers_of_its_own_and_goes_on_where_it_stopped(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    arguments = ("dev", SERVICE, "--data", str(data), "--no-reload")
    environment = {"TEST_NOTES": str(tmp_path)}
    with Command(*arguments, environment=environment, program="saga") as command:
        output = command.until(JOINED)
        found = re.search(r"export SAGACITY_BUS=(unix:\S+)", output)
        assert found
        publish(found[1], ("m1", Ordered("o1")))
        eventually((tmp_path / "begun-o1").exists, "the charge has begun")
        servers = [child.pid for child in psutil.Process(command.pid).children()]
        command.signal(signal.SIGINT)
        command.until("Stopping, finishing what has begun")
        command.signal(signal.SIGINT)
        assert command.ended() == 4
        eventually(lambda: not any(map(psutil.pid_exists, servers)), "its servers have ended")
    (tmp_path / "release-o1").touch()
    with Command(*arguments, environment=environment, program="saga") as command:
        command.until(JOINED)
        assert (data / "sagacity.db").exists()
        command.signal(signal.SIGINT)
        assert command.ended() == 0


def test_named_servers_are_used_instead() -> None:
    arguments = ("dev", SERVICE, "--store", "memory:", "--bus", "memory:", "--no-reload")
    with Command(*arguments, program="saga") as command:
        assert "export" not in command.until(JOINED), "URLs that are named may hold secrets"
        assert not psutil.Process(command.pid).children()
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
