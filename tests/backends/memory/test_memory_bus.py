"""The memory bus keeps the promises of a bus, and can be looked at and set back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sagacity.backends.memory import MemoryBus
from sagacity.testing.clock import VirtualClock
from sagacity.testing.conformance.bus import BusConformance, ids, messages

pytestmark = pytest.mark.asyncio


class MemoryServer:
    payload_bytes_max = 10_000

    def __init__(self) -> None:
        self.bus = MemoryBus(payload_bytes_max=self.payload_bytes_max)

    def connect(self) -> MemoryBus:
        return self.bus

    async def put_fields(self, topic: str, fields: Mapping[bytes, bytes]) -> None:
        self.bus.put_fields(topic, fields)

    async def delete(self, topic: str, entry_id: str) -> None:
        self.bus.delete(topic, entry_id)


class TestMemoryBus(BusConformance):
    @pytest.fixture
    def server(self) -> MemoryServer:
        return MemoryServer()


async def test_reclaim_goes_by_the_given_clock() -> None:
    clock = VirtualClock()
    bus = MemoryBus(clock)
    one, two = [await bus.join("g", name, ["orders"]) for name in ("one", "two")]
    await bus.publish(messages(2))
    await one.read(10, 0)
    clock.advance(29.999)
    assert await two.reclaim(30_000, 10) == []
    clock.advance(0.001)
    assert [d.attempt for d in await two.reclaim(30_000, 10)] == [2, 2]
    assert await two.reclaim(30_000, 10) == []


async def test_snapshot_holds_everything_and_restores_it() -> None:
    bus = MemoryBus(VirtualClock())
    subscription = await bus.join("g", "c", ["orders"])
    await bus.publish(messages(3))
    bus.put_fields("orders", {b"a": b"b"})
    before, digest = bus.snapshot(), bus.state_hash()
    found = await subscription.read(2, 0)
    assert bus.state_hash() != digest
    bus.restore(before)
    assert bus.state_hash() == digest
    assert await subscription.read(2, 0) == found
    await subscription.ack(found)
    other = MemoryBus(VirtualClock())
    other.restore(bus.snapshot())
    assert other.state_hash() == bus.state_hash()
    rest = await (await other.join("g", "c", ["orders"])).read(10, 0)
    assert ids(rest)[0] == "orders-2"


async def test_wiped_bus_goes_on_from_the_first_message() -> None:
    bus = MemoryBus()
    assert await bus.epoch("e1") == await bus.epoch("e2") == "e1"
    subscription = await bus.join("g", "c", ["orders"])
    await bus.publish(messages(5))
    await subscription.read(10, 0)
    bus.wipe()
    assert await bus.epoch("e3") == "e3"
    assert await bus.last_entry_id("orders") is None
    await bus.publish(messages(2))
    assert ids(await subscription.read(10, 1000)) == ["orders-0", "orders-1"]


async def test_trim_keeps_what_a_group_has_not_acknowledged() -> None:
    clock = VirtualClock()
    bus = MemoryBus(clock)
    await bus.publish(messages(10))
    clock.advance(3600)
    assert await bus.trim(["orders", "unknown"], 0) == 0  # nobody has joined yet
    fast, slow = await bus.join("fast", "c", ["orders"]), await bus.join("slow", "c", ["orders"])
    await fast.ack(await fast.read(10, 0))
    handed = await slow.read(7, 0)
    await slow.ack([*handed[:4], *handed[5:]])
    assert await bus.trim(["orders"], 3600 * 1_000_000) == 0  # not older than the retention
    clock.advance(1)
    assert await bus.trim(["orders"], 3600 * 1_000_000) == 4
    assert [m.id for m in bus.messages("orders")] == [f"orders-{n}" for n in range(4, 10)]
    await slow.ack(handed)
    # The newest entry that everybody has read stays: by it the loss check knows the bus again.
    assert await bus.trim(["orders"], 3600 * 1_000_000) == 2
    late = await bus.join("late", "c", ["orders"])
    assert ids(await late.read(10, 0)) == ["orders-6", "orders-7", "orders-8", "orders-9"]
