"""The same services run in two ways: inline in one process, and by workers over a real bus."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal
from uuid import uuid4

import anyio
import msgspec
from sqlalchemy import text

from sagacity import Saga, Service
from sagacity.backends.sql import SqlStore
from sagacity.core.instance import Instance
from sagacity.testing import Inline
from sagacity.testing.clock import VirtualClock
from sagacity.worker.config import Settings
from sagacity.worker.opening import open_bus
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually

Way = Literal["inline", "bus"]


class Running(msgspec.Struct):
    """Services at work on `store`."""

    store: SqlStore
    settle: Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
    """Lets them work until a condition holds."""
    states: list[Any]
    """What the lifespan of each service yielded."""

    async def finish(self, saga: type[Saga], *keys: str) -> list[Instance]:
        """Lets them work until these instances are finished; returns the instances."""

        async def finished() -> bool:
            return all(
                i is not None and i.status.finished for i in await self._instances(saga, keys)
            )

        await self.settle(finished)
        return [i for i in await self._instances(saga, keys) if i is not None]

    async def _instances(self, saga: type[Saga], keys: tuple[str, ...]) -> list[Instance | None]:
        return [await self.store.saga(saga.__definition__.saga_type, key) for key in keys]

    async def messages(self) -> list[tuple[str, bytes, str]]:
        """Every message that left: its type, its body, and the type of what caused it."""
        async with self.store.engine.connect() as connection:
            rows = await connection.execute(
                text(
                    "SELECT message_id, message_type, headers, body FROM sagacity_outbox ORDER BY seq"
                )
            )
            found = [tuple(row) for row in rows]
        type_of = {bytes(id_).decode(): kind for id_, kind, _, _ in found}
        return [
            (kind, _without_ids(body), type_of.get(_cause(headers), ""))
            for _, kind, headers, body in found
        ]

    async def story(self, saga: type[Saga], key: str) -> list[tuple[str, str, str, str, str]]:
        """The transitions of one instance, without ids and times."""
        rows = await self.store.history(saga.__definition__.saga_type, key)
        return [
            (row.message_type, row.handler, row.state_from, row.state_to, row.status)
            for row in rows
        ]


def _cause(headers: bytes) -> str:
    return str(msgspec.json.decode(headers).get("causation_id", ""))


def _without_ids(body: bytes) -> bytes:
    """A reply of the framework names the command it answers; ids differ from run to run."""
    fields = msgspec.json.decode(body)
    fields.pop("command_id", None)
    return msgspec.json.encode(fields, order="deterministic")


@asynccontextmanager
async def running(
    way: Way, services: list[Service], store_url: str, bus_url: str
) -> AsyncGenerator[Running]:
    """The services at work, until the context ends."""
    if way == "inline":
        clock = VirtualClock()
        store = SqlStore(store_url, clock=clock)
        try:
            async with Inline(*services, store=store, clock=clock) as app:

                async def settle(condition: Callable[[], Awaitable[bool]]) -> None:
                    await app.run()
                    assert await condition()

                yield Running(store, settle, [r.participants.state for r in app._running])
        finally:
            await store.close()
        return
    store = SqlStore(store_url)
    bus = open_bus(bus_url, prefix=uuid4().hex)
    settings = Settings(
        store=store_url,
        bus=bus_url,
        read_block_ms=20,
        timeouts_poll_ms=20,
        pending_age_ms=20,
        sweep_interval_ms=20,
    )
    workers = [Worker(service, store, bus, settings) for service in services]

    async def wait(condition: Callable[[], Awaitable[bool]]) -> None:
        await async_eventually(condition, "what the services work on")

    async def joined() -> bool:
        return all(worker.ready for worker in workers)

    try:
        await store.prepare(create=True)
        async with anyio.create_task_group() as tasks:
            for worker in workers:
                tasks.start_soon(worker.run)
            await wait(joined)
            try:
                yield Running(store, wait, [worker.participants.state for worker in workers])
            finally:
                for worker in workers:
                    worker.stop()
    finally:
        await bus.close()
        await store.close()
