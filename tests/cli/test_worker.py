"""`saga-worker` as a real process, on real servers where it matters."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil
import pytest

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.core.delivery import Envelope
from sagacity.core.messages import Message, encode_message, message_type
from tests.cli.process import Command, eventually
from tests.cli.services import Block, Charge

SERVICE = "tests.cli.services:service"
MEMORY = {"SAGACITY_STORE": "memory:", "SAGACITY_BUS": "memory:"}
JOINED = "Worker joined its group"


def publish(url: str, *messages: tuple[str, Message]) -> None:
    async def send() -> None:
        bus = RedisBus(url)
        await bus.publish(
            [
                Envelope(
                    id=message_id,
                    type=message_type(message).name,
                    topic=message_type(message).topic,
                    body=encode_message(message),
                )
                for message_id, message in messages
            ]
        )
        await bus.close()

    asyncio.run(send())


@pytest.fixture
def servers(redis_url: str, sqlite_url: str, tmp_path: Path) -> dict[str, str]:
    return {
        "SAGACITY_STORE": sqlite_url,
        "SAGACITY_BUS": redis_url,
        "TEST_NOTES": str(tmp_path),
    }


def children(pid: int) -> list[int]:
    return sorted(child.pid for child in psutil.Process(pid).children())


# ------------------------------------------------------------------------------------ start and end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_ends_well(number: signal.Signals) -> None:
    with Command(SERVICE, environment=MEMORY) as command:
        command.until(JOINED)
        command.signal(number)
        assert command.ended() == 0
    assert f"Stopping, finishing what has begun (why={number.name}" in command.output
    assert "Traceback" not in command.output


def test_the_banner_tells_who_runs_and_the_json_log_is_json_only() -> None:
    with Command(SERVICE, environment=MEMORY) as command:
        assert "listens to" in command.until(JOINED)
    with Command(SERVICE, "--log-format", "json", environment=MEMORY) as command:
        command.until(JOINED)
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
    entries = [json.loads(line) for line in command.output.splitlines()]
    assert entries[0]["statement"] == "Service starting"
    assert entries[0]["service"] == "shop"


def test_what_a_handler_has_begun_is_finished_before_the_end(
    servers: Mapping[str, str], tmp_path: Path
) -> None:
    with Command(SERVICE, environment=servers) as command:
        command.until(JOINED)
        publish(servers["SAGACITY_BUS"], ("c1", Charge("a")))
        eventually((tmp_path / "begun-a").exists, "the handler has begun")
        command.signal(signal.SIGTERM)
        command.until("Stopping, finishing what has begun")
        assert not (tmp_path / "ended-a").exists()
        (tmp_path / "release-a").touch()
        assert command.ended() == 0
    assert (tmp_path / "ended-a").exists()
    with sqlite3.connect(tmp_path / "store.db") as database:
        assert database.execute("SELECT count(*) FROM sagacity_parked").fetchone() == (0,)


def test_a_second_signal_ends_at_once_and_the_message_is_done_again(
    servers: Mapping[str, str], tmp_path: Path
) -> None:
    with Command(SERVICE, "--lease-s", "1", environment=servers) as command:
        command.until(JOINED)
        publish(servers["SAGACITY_BUS"], ("c1", Charge("a")))
        eventually((tmp_path / "begun-a").exists, "the handler has begun")
        command.signal(signal.SIGTERM)
        command.until("Stopping, finishing what has begun")
        command.signal(signal.SIGTERM)
        assert command.ended(5) == 4
    assert "Stopping at once (why=SIGTERM)" in command.output
    (tmp_path / "release-a").touch()
    with Command(SERVICE, environment=servers) as command:
        eventually((tmp_path / "ended-a").exists, "another process finished the message")
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
    assert len((tmp_path / "begun-a").read_text().split()) == 2


def test_the_shutdown_time_out_ends_it(servers: Mapping[str, str], tmp_path: Path) -> None:
    with Command(SERVICE, "--shutdown-timeout-s", "0.3", environment=servers) as command:
        command.until(JOINED)
        publish(servers["SAGACITY_BUS"], ("c1", Charge("a")))
        eventually((tmp_path / "begun-a").exists, "the handler has begun")
        command.signal(signal.SIGTERM)
        assert command.ended(10) == 4
    assert 'Stopping at once (why="shutdown time-out")' in command.output


def test_code_that_blocks_the_loop_cannot_keep_the_process(
    servers: Mapping[str, str], tmp_path: Path
) -> None:
    with Command(SERVICE, "--shutdown-timeout-s", "0.2", environment=servers) as command:
        command.until(JOINED)
        publish(servers["SAGACITY_BUS"], ("b1", Block("b")))
        eventually((tmp_path / "begun-b").exists, "the loop is blocked")
        command.signal(signal.SIGTERM)
        assert command.ended(10) == 4
    assert "Ended without cleaning up" in command.output


# -------------------------------------------------------------------------------------- the servers


def test_an_unreachable_bus_is_waited_for_with_one_line(
    private_redis: EmbeddedRedis, sqlite_url: str
) -> None:
    private_redis.kill()
    environment = {"SAGACITY_STORE": sqlite_url, "SAGACITY_BUS": private_redis.url}
    with Command(SERVICE, environment=environment) as command:
        command.until("Server unreachable, waiting for it (server=bus")
        private_redis.restart()
        command.until("Server reached (server=bus")
        output = command.until(JOINED)
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
    assert output.count("Server unreachable") == 1
    assert "Traceback" not in output


def test_waiting_for_a_server_ends_with_a_signal(sqlite_url: str) -> None:
    environment = {"SAGACITY_STORE": sqlite_url, "SAGACITY_BUS": "redis://127.0.0.1:1/0"}
    with Command(SERVICE, environment=environment) as command:
        command.until("Server unreachable")
        command.signal(signal.SIGTERM)
        assert command.ended(10) == 0


def test_flags_win_over_the_environment_in_children_too(servers: Mapping[str, str]) -> None:
    environment = {**servers, "SAGACITY_CONSUMER": "named", "SAGACITY_LOGLEVEL": "x"}
    with Command(SERVICE, "-w", "2", "--consumer", "", environment=environment) as command:
        output = command.until(JOINED, times=2)
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
    assert "consumer=named" not in output
    assert output.count("SAGACITY_LOGLEVEL is read by nobody; SAGACITY_LOG_LEVEL?") == 1


def test_no_secret_is_ever_printed() -> None:
    environment = {
        "SAGACITY_STORE": "postgresql+asyncpg://shop:hunter2%40x@127.0.0.1:1/shop",
        "SAGACITY_BUS": "redis://:opensesame@127.0.0.1:1/0",
    }
    for form in ("human", "json"):
        flags = ("--log-format", form, "--log-level", "debug")
        with Command(SERVICE, *flags, environment=environment) as command:
            command.until("Server unreachable")
            command.signal(signal.SIGTERM)
            assert command.ended() == 0
        assert "shop:***@127.0.0.1" in command.output
        assert not re.search("hunter2|opensesame", command.output)


def test_a_password_in_the_arguments_is_warned_of() -> None:
    with Command(SERVICE, "--bus", "redis://:opensesame@127.0.0.1:1/0", "--store", "memory:") as c:
        c.until("Warning: a password on the command line is visible")
        c.signal(signal.SIGTERM)
    assert "opensesame" not in c.output


def test_missing_tables_end_it_with_the_command_that_makes_them(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE something_else (x)")
    environment = {"SAGACITY_STORE": f"sqlite+aiosqlite:///{path}", "SAGACITY_BUS": "memory:"}
    with Command(SERVICE, environment=environment) as command:
        assert command.ended() == 3
    assert "saga migrate" in command.output
    assert "Traceback" not in command.output
    with Command(SERVICE, "--migrate", environment=environment) as command:
        command.until(JOINED)
        command.signal(signal.SIGTERM)
        assert command.ended() == 0


def test_an_unsafe_bus_is_told_or_refused(redis_url: str) -> None:
    environment = {"SAGACITY_STORE": "memory:", "SAGACITY_BUS": redis_url}
    with Command(SERVICE, environment=environment) as command:
        assert "Bus is set up unsafely" in command.until(JOINED)
    with Command(SERVICE, "--refuse-unsafe", environment=environment) as command:
        assert command.ended() == 2
    assert "--refuse-unsafe: expected a bus that cannot lose messages" in command.output


def test_health_is_answered_while_it_runs() -> None:
    with Command(SERVICE, "--health", "127.0.0.1:0", environment=MEMORY) as command:
        output = command.until(JOINED)
        found = re.search(r"Health server started \(host=127.0.0.1, port=(\d+)\)", output)
        assert found
        answer = httpx.get(f"http://127.0.0.1:{found[1]}/readyz")
        assert answer.status_code == 200
        assert answer.json()["service"] == "shop"


# ------------------------------------------------------------------------------------ many processes


def test_workers_are_kept_running_and_drained(servers: Mapping[str, str]) -> None:
    with Command(SERVICE, "-w", "2", "--health", "0", environment=servers) as command:
        output = command.until(JOINED, times=2)
        assert output.count("Bus is set up unsafely") == 1, "one of them tells it for all"
        port = re.findall(r"port=(\d+)", output)[0]
        before = children(command.pid)
        assert len(before) == 2
        psutil.Process(before[0]).kill()
        command.until(JOINED, times=3)
        assert "ended_by=SIGKILL" in command.output
        after = children(command.pid)
        assert len(after) == 2
        assert before[0] not in after

        def all_ready() -> bool:
            workers = httpx.get(f"http://127.0.0.1:{port}/readyz").json()["workers"]
            return [worker["ready"] for worker in workers.values()] == [True, True]

        eventually(all_ready, "both workers report that they are ready")
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
        assert not any(psutil.pid_exists(pid) for pid in after)
    assert "All workers stopped (status=0)" in command.output


def test_ctrl_c_in_a_terminal_drains_workers_once(servers: Mapping[str, str]) -> None:
    with Command(SERVICE, "-w", "2", environment=servers) as command:
        command.until(JOINED, times=2)
        command.signal(signal.SIGINT)
        assert command.ended() == 0
    assert "Stopping at once" not in command.output


def test_a_second_signal_ends_all_workers_at_once(
    servers: Mapping[str, str], tmp_path: Path
) -> None:
    with Command(SERVICE, "-w", "2", environment=servers) as command:
        command.until(JOINED, times=2)
        publish(servers["SAGACITY_BUS"], ("c1", Charge("a")))
        eventually((tmp_path / "begun-a").exists, "the handler has begun")
        command.signal(signal.SIGTERM)
        command.until("Stopping, finishing what has begun", times=2)
        command.signal(signal.SIGTERM)
        assert command.ended(10) == 4


def test_workers_end_when_their_parent_is_killed(servers: Mapping[str, str]) -> None:
    with Command(SERVICE, "-w", "2", environment=servers) as command:
        command.until(JOINED, times=2)
        orphans = children(command.pid)
        command.signal(signal.SIGKILL)
        command.ended()
        eventually(
            lambda: not any(psutil.pid_exists(pid) for pid in orphans), "the workers have ended"
        )
    assert 'why="parent process ended"' in command.output


def test_workers_that_can_never_start_end_the_parent(servers: Mapping[str, str]) -> None:
    with Command("tests.cli.services:absent", "-w", "2", environment=servers) as command:
        assert command.ended() == 2
    assert "has no 'absent'" in command.output


# -------------------------------------------------------------------------------------------- reload


def test_reload_starts_anew_when_a_file_changes(tmp_path: Path) -> None:
    module = tmp_path / "reloaded.py"
    text = "from sagacity import Service\nservice = Service('first')\n"
    module.write_text(text)
    arguments = ("reloaded", "--reload", "--app-dir", str(tmp_path))
    with Command(*arguments, environment=MEMORY) as command:
        command.until("service=first")
        command.until("Watching for changes")
        module.write_text("this is no Python")
        command.until("Worker ended, waiting for a change")
        assert "SyntaxError" in command.output
        module.write_text(text.replace("first", "second"))
        command.until("service=second")
        command.signal(signal.SIGTERM)
        assert command.ended() == 0


def test_reload_waits_for_a_change_where_the_module_ends_its_process(
    servers: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "fatal.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    arguments = ("fatal:service", "--reload")
    with Command(*arguments, "--app-dir", str(tmp_path), environment=servers) as command:
        command.until("Worker ended, waiting for a change")
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
