"""The Redis bus on a cluster, and behind Sentinel through a failover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis.asyncio.cluster import RedisCluster

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.core.delivery import Delivery
from sagacity.core.errors import BusUnavailable
from sagacity.testing.conformance.bus import BusConformance, ids, ids_of, messages, read_all
from tests.backends.redis.fleets import cluster, send, watched

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[EmbeddedRedis]]:
    with cluster() as nodes:
        yield nodes


class ClusterServer:
    payload_bytes_max = 10_000

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self) -> RedisBus:
        return RedisBus(
            self.url.replace("redis://", "redis+cluster://"),
            payload_bytes_max=self.payload_bytes_max,
        )

    async def put_fields(self, topic: str, fields: Mapping[bytes, bytes]) -> None:
        entry: dict[Any, Any] = dict(fields)
        async with RedisCluster.from_url(self.url) as client:
            await client.xadd(f"sagacity:{topic}", entry)

    async def delete(self, topic: str, entry_id: str) -> None:
        async with RedisCluster.from_url(self.url) as client:
            assert await client.xdel(f"sagacity:{topic}", entry_id) == 1


@pytest.mark.asyncio
class TestRedisCluster(BusConformance):
    @pytest.fixture
    def server(self, nodes: list[EmbeddedRedis]) -> ClusterServer:
        for node in nodes:
            send(node, "FLUSHALL")
        return ClusterServer(f"redis://127.0.0.1:{nodes[0].port}")


@pytest.mark.asyncio
async def test_upkeep_of_a_cluster_asks_every_node(nodes: list[EmbeddedRedis]) -> None:
    for node in nodes:
        send(node, "FLUSHALL")
    topics = [f"topic{number}" for number in range(8)]
    async with RedisBus(f"redis+cluster://127.0.0.1:{nodes[1].port}") as bus:
        subscription = await bus.join("g", "c", topics)
        await bus.publish([m for topic in topics for m in messages(300, topic)])
        assert all(send(node, "DBSIZE") for node in nodes)  # the topics are spread
        await subscription.ack(await read_all(subscription, 2400, limit=500))
        assert await bus.trim(topics, 0) >= 8 * 100
        assert len(await bus.check()) == 3  # appendonly no, on each
        assert len((await bus.identity()).split()) == 3
        assert await bus.epoch("e1") == await bus.epoch("e2") == "e1"
        last = await bus.last_entry_id(topics[0])
        assert last is not None
        assert await bus.holds(topics[0], last)


@pytest.mark.asyncio
async def test_bus_follows_sentinel_to_the_new_primary(tmp_path: Path) -> None:
    with watched(tmp_path) as fleet:
        async with RedisBus(fleet.url, timeout_s=1.0) as bus:
            subscription = await bus.join("g", "c", ["orders"])
            await bus.publish(messages(3))
            before = await bus.identity()
            handed = await read_all(subscription, 3)
            await subscription.ack(handed[:1])
            with anyio.fail_after(30):
                while send(fleet.replica, "XPENDING", "sagacity:orders", "g")["pending"] != 2:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                fleet.primary.kill()
                published = False
                found: list[Delivery] = []
                while len({*ids(found)}) < 4:
                    try:
                        if not published:
                            await bus.publish(messages(2, start=3))
                            published = True
                        found += await subscription.read(10, 200)
                    except BusUnavailable:
                        await anyio.sleep(0.05)
            assert {*ids(found)} == {*ids_of(messages(4, start=1))}
            assert await bus.identity() != before
