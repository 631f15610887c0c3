"""Whether anything is still under way between the services: messages on the bus, work, retries.

Sagas that wait for a person or for a timeout do not count: nothing moves until then.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import redis
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.tables import outbox, outbox_pending, parked, saga
from sagacity.core.errors import Unavailable


class Moving(msgspec.Struct, frozen=True):
    """What was under way when it was looked at."""

    unpublished: int = 0
    """Outbox rows that the bus has not acknowledged."""
    on_the_bus: int = 0
    """Messages that a service has not read or not acknowledged."""
    parked: int = 0
    """Messages held in SQL: being worked on, waiting for a retry, or for their instance."""
    marks: tuple[tuple[int, int], ...] = ()
    """Grows with every message that any service emits, and with every step of a saga."""

    @property
    def nothing(self) -> bool:
        return not (self.unpublished or self.on_the_bus or self.parked)


class StillMoving(Exception):
    """The program did not come to rest in time."""


async def moving(stores: Mapping[str, SqlStore], bus: str, prefix: str) -> Moving:
    """Look at all services once."""
    unpublished = held = 0
    marks: list[tuple[int, int]] = []
    for store in stores.values():
        async with store.engine.connect() as connection:
            await connection.execution_options(sagacity_read_only=True)
            count = select(
                select(func.count()).select_from(outbox_pending).scalar_subquery(),
                select(func.count()).select_from(parked).scalar_subquery(),
                select(func.coalesce(func.max(outbox.c.seq), 0)).scalar_subquery(),
                select(func.coalesce(func.max(saga.c.updated_at), 0)).scalar_subquery(),
            )
            row = (await connection.execute(count)).one()
        unpublished += row[0]
        held += row[1]
        marks.append((row[2], row[3]))
    on_the_bus = await asyncio.to_thread(_unread, bus, prefix)
    return Moving(unpublished, on_the_bus, held, tuple(marks))


class Rest:
    """Looks again and again whether the program has come to rest; the caller closes it."""

    def __init__(self, stores: Mapping[str, str], bus: str, prefix: str) -> None:
        self._stores = {service: SqlStore(url) for service, url in stores.items()}
        self._bus, self._prefix = bus, prefix
        self._before = Moving()
        self.seen = ""
        """What was under way at the last look, or why there was none."""

    async def reached(self) -> bool:
        """Look once; True if nothing is under way, and nothing was the last time."""
        try:
            now = await moving(self._stores, self._bus, self._prefix)
        except (Unavailable, DBAPIError, OSError, redis.ConnectionError) as error:
            self.seen = str(error)  # a server may be down on purpose
            return False
        before, self._before, self.seen = self._before, now, str(now)
        # A message that moved on between two places while we looked has left a mark.
        return now.nothing and before.nothing and now.marks == before.marks

    async def close(self) -> None:
        for store in self._stores.values():
            await store.close()


async def until_quiet(
    stores: Mapping[str, str], bus: str, prefix: str, deadline: float = 30.0
) -> None:
    """Return when nothing has been under way for two looks in a row; raises StillMoving."""
    ends = time.monotonic() + deadline
    rest = Rest(stores, bus, prefix)
    try:
        while not await rest.reached():
            if time.monotonic() > ends:
                raise StillMoving(f"not at rest within {deadline:g} seconds: {rest.seen}")
            await asyncio.sleep(0.05)
    finally:
        await rest.close()


def _unread(bus: str, prefix: str) -> int:
    """Entries that any group has still to read or to acknowledge."""
    count = 0
    opened: Any = redis.Redis.from_url(bus)  # whose annotations are for asyncio too
    with opened as client:
        for key in client.scan_iter(match=f"{prefix}:*", _type="stream"):
            last = client.xinfo_stream(key)["last-generated-id"]
            for group in client.xinfo_groups(key):
                count += group["pending"]
                if group["last-delivered-id"] != last:
                    count += 1
    return count
