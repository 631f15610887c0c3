"""Batches of which the database refuses a part."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest

from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.core.delivery import Delivery
from sagacity.core.errors import DataRefused
from sagacity.core.plan import Plan
from sagacity.testing.clock import VirtualClock
from sagacity.worker.cycle import Cycle
from sagacity.worker.sorting import due_inputs
from tests.worker.running import envelope
from tests.worker.shop import OrderPlaced, Poke, Shop

pytestmark = pytest.mark.asyncio


class Refusing(MemoryStore):
    """Refuses the plans that a test picks."""

    def __init__(self) -> None:
        self.virtual = VirtualClock()
        super().__init__(clock=self.virtual)
        self.refuses: Callable[[Plan], bool] = lambda plan: False

    @asynccontextmanager
    async def transaction(self, *, optimistic: bool = False) -> AsyncGenerator[Any]:
        async with super().transaction(optimistic=optimistic) as transaction:
            write = transaction.write

            async def checked(plan: Plan, *args: Any) -> Any:
                if self.refuses(plan):
                    raise DataRefused("write: a value is refused")
                return await write(plan, *args)

            changed: Any = transaction
            changed.write = checked
            yield transaction


def delivery(message: Any, name: str) -> Delivery:
    return Delivery(topic="orders", entry_id=f"{name}-0", envelope=envelope(message, name))


async def cycle_on(store: MemoryStore) -> Cycle:
    await store.prepare(create=True)
    service = Shop().service(subscribers=False)
    return Cycle(service, service.catalog(), store, MemoryBus())


async def test_the_effects_of_a_timeout_are_refused() -> None:
    """It is parked as a message that failed, and the timeouts of the others fire."""
    store = Refusing()
    cycle = await cycle_on(store)
    await cycle.settle([delivery(OrderPlaced(f"o{n}"), f"m{n}") for n in range(3)])
    store.virtual.advance(timedelta(hours=2))
    store.refuses = lambda plan: any(
        row.saga_key == "o1" and row.state_to == "failed" for row in plan.transitions
    )
    with anyio.fail_after(10):
        await cycle.settle(due_inputs(await store.due(["Order"], 10)))
    states = [(await _saga(store, f"o{n}")) for n in range(3)]
    assert states == ["compensating", "running", "compensating"]
    counts = await store.counts()
    assert (counts["timeouts"], counts["parked"]) == (0, 1)


async def test_a_message_of_which_not_even_the_failure_can_be_written_is_left() -> None:
    """It is not acknowledged; what came with it is done."""
    store = Refusing()
    cycle = await cycle_on(store)

    def bad(plan: Plan) -> bool:
        rows: list[Any] = [*plan.transitions, *plan.parked, *plan.dead_letters]
        return any(row.message_id == "bad" for row in rows)

    store.refuses = bad
    batch = [
        delivery(OrderPlaced("o1"), "m1"),
        delivery(OrderPlaced("o2"), "bad"),
        delivery(Poke("o1"), "m2"),
    ]
    with anyio.fail_after(10):
        settled = await cycle.settle(batch)
    assert [one.entry_id for one in settled.done] == ["m1-0", "m2-0"]
    assert settled.busy == []


async def _saga(store: MemoryStore, key: str) -> str:
    instance = await store.saga("Order", key)
    assert instance is not None
    return str(instance.status)
