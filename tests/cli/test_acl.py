"""The Redis rights that the deployment page names are enough for a worker, and not more than that."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import redis

from sagacity.backends.redis.embedded import EmbeddedRedis
from tests.cli.process import Command, eventually
from tests.cli.services import Ordered
from tests.cli.test_deploy_page import PAGE
from tests.cli.test_worker import JOINED, SERVICE, publish


@pytest.fixture
def restricted(private_redis: EmbeddedRedis) -> str:
    """The URL of a Redis for the user of the page."""
    found = re.search(r"^ACL SETUSER (.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    with redis.Redis.from_url(private_redis.url) as client:
        client.execute_command("ACL", "SETUSER", *found[1].split())
    return private_redis.url.replace("unix://", "unix://shop:password@")


def test_a_worker_needs_no_more_rights_than_the_page_gives(
    restricted: str, sqlite_url: str, tmp_path: Path
) -> None:
    environment = {
        "SAGACITY_STORE": sqlite_url,
        "SAGACITY_BUS": restricted,
        "TEST_NOTES": str(tmp_path),
        "SAGACITY_RECLAIM_INTERVAL_MS": "50",
        "SAGACITY_CLEANING_INTERVAL_S": "0.1",
    }
    (tmp_path / "release-o1").touch()
    with Command(SERVICE, environment=environment) as command:
        command.until(JOINED)
        publish(restricted, ("m1", Ordered("o1")))
        eventually((tmp_path / "ended-o1").exists, "the order was charged")
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
    assert not re.search(r"(?i)noperm|permission|Traceback", command.output), command.output
    assert "password" not in command.output.replace("user:password", "")


@pytest.mark.parametrize("words", [("FLUSHALL",), ("KEYS", "*"), ("GET", "other"), ("DEL", "x")])
def test_the_user_of_the_page_can_do_no_harm(restricted: str, words: tuple[str, ...]) -> None:
    with (
        redis.Redis.from_url(restricted) as client,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*words)
