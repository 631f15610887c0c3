"""The Redis bus keeps the promises of a bus, over both protocols of Redis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from redis.asyncio import Redis

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.connection import Connector
from sagacity.testing.conformance.bus import BusConformance

pytestmark = pytest.mark.asyncio


class Server:
    payload_bytes_max = 10_000

    def __init__(self, url: str, protocol: Literal[2, 3]) -> None:
        self.url, self.protocol = url, protocol

    def connect(self) -> RedisBus:
        return RedisBus(self.url, payload_bytes_max=self.payload_bytes_max, protocol=self.protocol)

    async def put_fields(self, topic: str, fields: Mapping[bytes, bytes]) -> None:
        entry: dict[Any, Any] = dict(fields)
        async with Redis.from_url(self.url) as client:
            await client.xadd(f"sagacity:{topic}", entry)

    async def delete(self, topic: str, entry_id: str) -> None:
        async with Redis.from_url(self.url) as client:
            assert await client.xdel(f"sagacity:{topic}", entry_id) == 1


class TestRedisBus(BusConformance):
    @pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
    def server(self, redis_url: str, request: pytest.FixtureRequest) -> Server:
        return Server(redis_url, request.param)


class TestRedisBusByClients(BusConformance):
    """All of it goes through redis-py's clients, as in a cluster."""

    @pytest.fixture
    def server(self, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Server:
        monkeypatch.setattr(Connector, "_has_lines", False)
        return Server(redis_url, 2)
