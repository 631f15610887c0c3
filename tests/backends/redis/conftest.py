"""What the tests of the Redis bus share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sagacity.backends.redis.connection import Connector

Command = Callable[..., Awaitable[Any]]
"""Sends one command to a Redis: ``await command(url, "XLEN", key)``."""


@pytest.fixture
def command() -> Command:
    async def send(url: str, *parts: Any, **options: Any) -> Any:
        client = Connector(url, timeout_s=5, connections_max=1, protocol=2).shared()
        try:
            return await client.execute_command(*parts, **options)
        finally:
            await client.aclose()

    return send
