"""Several Redis servers that belong together: a cluster, and a primary that Sentinel watches."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from sagacity.backends.redis.embedded import EmbeddedRedis

SLOTS = 16384
DEADLINE_S = 30.0


def send(server: EmbeddedRedis, *command: Any) -> Any:
    with redis.Redis.from_url(server.url) as client:
        return client.execute_command(*command)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.02)


@contextmanager
def cluster(size: int = 3) -> Iterator[list[EmbeddedRedis]]:
    """A cluster of primaries that share the slots."""
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(EmbeddedRedis(tcp_port=_cluster_port(), settings=settings))
            for _ in range(size)
        ]
        for number, node in enumerate(nodes):
            own = range(SLOTS * number // size, SLOTS * (number + 1) // size)
            send(node, "CLUSTER ADDSLOTS", *own)
            send(node, "CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number:
                send(node, "CLUSTER MEET", "127.0.0.1", nodes[0].port)
        until(lambda: all(_complete(node, size) for node in nodes), "the cluster")
        yield nodes


def _cluster_port() -> int:
    """A free port; the nodes talk to each other on the one 10,000 above it."""
    while True:
        with socket.socket() as clients, socket.socket() as nodes:
            clients.bind(("127.0.0.1", 0))
            port: int = clients.getsockname()[1]
            if port < 55_000:
                try:
                    nodes.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


def _complete(node: EmbeddedRedis, size: int) -> bool:
    state = send(node, "CLUSTER INFO")["cluster_state"]
    return bool(state == "ok" and len(send(node, "CLUSTER SLOTS")) == size)


@dataclass
class Watched:
    """A primary, its replica, and the Sentinel that promotes the replica."""

    primary: EmbeddedRedis
    replica: EmbeddedRedis
    sentinel: EmbeddedRedis

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/service/0"


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """One Sentinel, which alone decides, watches one primary with one replica."""
    with ExitStack() as stack:
        primary = stack.enter_context(EmbeddedRedis(tcp_port=0))
        replica = stack.enter_context(
            EmbeddedRedis(tcp_port=0, settings={"replicaof": f"127.0.0.1 {primary.port}"})
        )
        until(
            lambda: send(replica, "INFO", "replication")["master_link_status"] == "up",
            "the replica's copy",
        )
        # A server started under this name is a Sentinel.
        program = directory / "redis-sentinel"
        program.symlink_to(_server_program(primary))
        sentinel = stack.enter_context(
            EmbeddedRedis(
                tcp_port=0,
                executable=program,
                settings={
                    "sentinel monitor service": f"127.0.0.1 {primary.port} 1",
                    "sentinel down-after-milliseconds service": "300",
                    "sentinel failover-timeout service": "3000",
                },
            )
        )
        until(lambda: len(send(sentinel, "SENTINEL", "REPLICAS", "service")) == 1, "discovery")
        yield Watched(primary, replica, sentinel)


def _server_program(server: EmbeddedRedis) -> Path:
    return Path(send(server, "INFO", "server")["executable"])
