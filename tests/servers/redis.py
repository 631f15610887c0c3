"""The Redis that tests talk to: `SAGACITY_TEST_REDIS_URL`, else one of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from sagacity.backends.redis.embedded import EmbeddedRedis

URL_VARIABLE = "SAGACITY_TEST_REDIS_URL"


@dataclass(frozen=True)
class RedisServer:
    """A running Redis whose content belongs to the tests: everything in it may be wiped.

    `embedded` is the process behind it, or None where the environment named the server. A test that
    kills or restarts Redis takes the `private_redis` fixture instead of this shared one.
    """

    url: str
    embedded: EmbeddedRedis | None

    def wipe(self) -> None:
        """Empty it: all databases of an own server, the named database of a foreign one."""
        with redis.Redis.from_url(self.url) as client:
            if self.embedded is not None:
                client.flushall()
            else:
                client.flushdb()


@contextmanager
def running_redis() -> Iterator[RedisServer]:
    """The Redis of the test run; raises `EmbeddedServerMissing` where none can be had."""
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield RedisServer(named, None)
        return
    with EmbeddedRedis() as embedded:
        yield RedisServer(embedded.url, embedded)
