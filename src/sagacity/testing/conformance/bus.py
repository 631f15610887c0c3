"""The suite every bus must pass: each promise of `sagacity.ports.Bus` and `Subscription`.

Subclass `BusConformance` in a test module, give it a fixture ``server`` that returns a `BusServer`,
and mark the class for your asynchronous test plugin::

    @pytest.mark.asyncio
    class TestMyBus(BusConformance):
        @pytest.fixture
        def server(self) -> MyServer: ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import anyio

from sagacity.core.delivery import Delivery, Envelope
from sagacity.core.errors import BusError
from sagacity.ports import Bus, Subscription

__all__ = ["BusConformance", "BusServer", "Connections"]

TOPIC = "orders"
WAIT_MS = 5000
"""How long a read waits for what must come; never waited for in full by a correct bus."""
SHORT_MS = 50
"""How long a read waits for what must not come."""


class BusServer(Protocol):
    """One empty bus, and what a test does to it behind its back."""

    payload_bytes_max: int
    """Largest body the buses of `connect` take."""

    def connect(self) -> Bus:
        """A new connection, as another process would have one."""
        ...

    async def put_fields(self, topic: str, fields: Mapping[bytes, bytes]) -> None:
        """Appends an entry that was not made by `Bus.publish`."""
        ...

    async def delete(self, topic: str, entry_id: str) -> None:
        """Deletes an entry, whether it is pending or not."""
        ...


class Connections:
    """Opens buses and subscriptions, and closes them all at the end."""

    def __init__(self, server: BusServer, stack: AsyncExitStack) -> None:
        self._server, self._stack = server, stack

    def bus(self) -> Bus:
        """A new connection."""
        bus = self._server.connect()
        self._stack.push_async_callback(bus.close)
        return bus

    async def join(
        self, group: str = "g", consumer: str = "c", topics: Sequence[str] = (TOPIC,)
    ) -> Subscription:
        """A subscription over a connection of its own."""
        return await self.bus().join(group, consumer, topics)


@asynccontextmanager
async def connections(server: BusServer) -> AsyncGenerator[Connections]:
    """Connections to `server` that are closed at the end."""
    async with AsyncExitStack() as stack:
        yield Connections(server, stack)


def message(number: int, topic: str = TOPIC, body: bytes = b"{}") -> Envelope:
    """A small message."""
    return Envelope(id=f"{topic}-{number}", type="shop.Happened", topic=topic, body=body)


def messages(count: int, topic: str = TOPIC, start: int = 0) -> list[Envelope]:
    """Numbered messages of one topic."""
    return [message(number, topic) for number in range(start, start + count)]


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    """The message ids; the fault where there is none."""
    return [d.envelope.id if d.envelope is not None else d.fault for d in deliveries]


async def read_all(subscription: Subscription, count: int, limit: int = 100) -> list[Delivery]:
    """Reads until `count` entries came, and fails if more do."""
    found: list[Delivery] = []
    while len(found) < count:
        some = await subscription.read(limit, WAIT_MS)
        assert some, f"expected {count} entries, got {len(found)}: {ids(found)}"
        found += some
    assert len(found) == count, f"expected {count} entries, got {len(found)}: {ids(found)}"
    return found


async def nothing_more(subscription: Subscription) -> None:
    """Fails if the subscription has something to read."""
    more = await subscription.read(100, SHORT_MS)
    assert more == [], f"expected nothing more to read, got {ids(more)}"


async def reclaim_all(subscription: Subscription, count: int, limit: int = 100) -> list[Delivery]:
    """Reclaims, whatever its idle time, until `count` entries came."""
    found: list[Delivery] = []
    while len(found) < count:
        some = await subscription.reclaim(0, limit)
        assert some, f"expected to reclaim {count} entries, got {len(found)}"
        assert len(some) <= limit, f"expected at most {limit} entries, got {len(some)}"
        found += some
    return found


class BusConformance:
    """The promises of a bus, one test each."""

    # --- publishing and reading -----------------------------------------------------------------

    async def test_message_arrives_as_it_was_published(self, server: BusServer) -> None:
        """Every attribute of an envelope survives the bus."""
        full = Envelope(
            id="id ä€ 1",
            type="shop.Happened",
            topic=TOPIC,
            body=b'{"text":"\xc3\xa4","n":1.5}',
            version=3,
            kind="command",
            time=1_767_225_600_123_456,
            source="shop",
            subject="Order/17",
            correlation_id="c-1",
            causation_id="c-0",
            actor="user:5",
            hops=7,
            saga_type="Booking",
            saga_key="k/1",
            saga_uid="u1",
            reply_to="replies",
            reply_topics=("a", "b"),
            in_reply_to="cmd-1",
            undoes="cmd-0",
            sequence=4,
            traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            tracestate="vendor=1",
        )
        async with connections(server) as connect:
            subscription = await connect.join()
            await connect.bus().publish([full, message(1)])
            first, second = await read_all(subscription, 2)
        assert first.envelope == full
        assert second.envelope == message(1)
        assert (first.topic, first.fault, first.raw, first.attempt) == (TOPIC, "", b"", 1)
        assert first.entry_id != second.entry_id

    async def test_order_of_a_topic_is_the_order_of_publishing(self, server: BusServer) -> None:
        """Over several calls of `publish`, from one task."""
        async with connections(server) as connect:
            subscription, bus = await connect.join(), connect.bus()
            for start in range(0, 300, 50):
                await bus.publish(messages(50, start=start))
            found = await read_all(subscription, 300, limit=70)
        assert ids(found) == ids_of(messages(300))

    async def test_read_hands_out_at_most_the_limit(self, server: BusServer) -> None:
        """Also where several topics have entries, and none is left out for good."""
        topics = ("a", "b", "c")
        async with connections(server) as connect:
            subscription, bus = await connect.join(topics=topics), connect.bus()
            expected = {topic: ids_of(messages(40, topic)) for topic in topics}
            await bus.publish([m for topic in topics for m in messages(40, topic)])
            found: dict[str, list[str]] = {topic: [] for topic in topics}
            while found != expected:
                some = await subscription.read(7, WAIT_MS)
                assert 0 < len(some) <= 7, f"expected 1 to 7 entries, got {len(some)}"
                for delivery in some:
                    found[delivery.topic] += ids([delivery])
            await nothing_more(subscription)

    async def test_publishing_nothing_is_fine(self, server: BusServer) -> None:
        """No entry, no error."""
        async with connections(server) as connect:
            subscription = await connect.join()
            await connect.bus().publish([])
            await nothing_more(subscription)

    async def test_topics_are_separate(self, server: BusServer) -> None:
        """A subscription gets its own topics and no others."""
        async with connections(server) as connect:
            subscription = await connect.join(topics=("a",))
            await connect.bus().publish([message(1, "b"), message(1, "a"), message(2, "b")])
            assert ids(await read_all(subscription, 1)) == ["a-1"]
            await nothing_more(subscription)

    async def test_message_too_large_is_refused_before_anything_is_sent(
        self, server: BusServer
    ) -> None:
        """The error names the message, its size and the limit."""
        limit = server.payload_bytes_max
        large = message(2, body=b'"' + b"x" * (limit - 1) + b'"')
        fits = message(3, body=b'"' + b"x" * (limit - 2) + b'"')
        async with connections(server) as connect:
            subscription, bus = await connect.join(), connect.bus()
            text = await error_of(bus.publish([message(1), large]))
            for part in (large.id, large.type, str(limit), str(limit + 1)):
                assert part in text, f"expected {part!r} in the error, got: {text}"
            await nothing_more(subscription)
            await bus.publish([fits])
            (found,) = await read_all(subscription, 1)
            assert found.envelope == fits

    # --- waiting --------------------------------------------------------------------------------

    async def test_waiting_read_gets_what_is_published_meanwhile(self, server: BusServer) -> None:
        """At once, not at the end of its time."""
        async with connections(server) as connect:
            subscription, bus = await connect.join(topics=("a", "b")), connect.bus()
            await nothing_more(subscription)
            with anyio.fail_after(WAIT_MS / 1000):
                for number, topic in enumerate(("a", "b", "a")):
                    found: list[Delivery] = []
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(read_into, subscription, found)
                        await anyio.wait_all_tasks_blocked()
                        await bus.publish([message(number, topic)])
                    assert ids(found) == [f"{topic}-{number}"]

    async def test_read_without_entries_ends(self, server: BusServer) -> None:
        """After its time, and at once where it may not wait."""
        async with connections(server) as connect:
            subscription = await connect.join()
            with anyio.fail_after(WAIT_MS / 1000):
                assert await subscription.read(10, 0) == []
                assert await subscription.read(10, SHORT_MS) == []
                await connect.bus().publish([message(1)])
                assert ids(await subscription.read(10, 0)) == [f"{TOPIC}-1"]

    async def test_wake_ends_a_waiting_read(self, server: BusServer) -> None:
        """And reading on afterwards misses nothing."""
        async with connections(server) as connect:
            subscription, bus = await connect.join(), connect.bus()
            await nothing_more(subscription)
            for number in range(3):
                found: list[Delivery] = []
                with anyio.fail_after(WAIT_MS / 2000):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(read_into, subscription, found)
                        await anyio.wait_all_tasks_blocked()
                        subscription.wake()
                assert found == []
                await bus.publish([message(number)])
                assert ids(await read_all(subscription, 1)) == [f"{TOPIC}-{number}"]

    async def test_wake_before_a_read_is_not_lost(self, server: BusServer) -> None:
        """It ends the next one, once."""
        async with connections(server) as connect:
            subscription = await connect.join()
            subscription.wake()
            with anyio.fail_after(WAIT_MS / 2000):
                assert await subscription.read(10, WAIT_MS) == []
            await connect.bus().publish([message(1)])
            assert ids(await read_all(subscription, 1)) == [f"{TOPIC}-1"]

    async def test_cancelled_read_loses_nothing(self, server: BusServer) -> None:
        """It must not happen, but if it does: the entries come with the next read, once and all."""
        async with connections(server) as connect:
            subscription, bus = await connect.join(), connect.bus()
            await nothing_more(subscription)
            found: list[Delivery] = []
            for number in range(8):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read_into, subscription, found)
                    await anyio.wait_all_tasks_blocked()
                    await bus.publish([message(number)])
                    tasks.cancel_scope.cancel()
            found += await read_all(subscription, 8 - len(found)) if len(found) < 8 else []
            assert ids(found) == ids_of(messages(8))

    # --- groups ---------------------------------------------------------------------------------

    async def test_each_group_gets_every_message(self, server: BusServer) -> None:
        """Reading and acknowledging in one group does not touch the other."""
        async with connections(server) as connect:
            one, two = await connect.join("one"), await connect.join("two")
            await connect.bus().publish(messages(10))
            first = await read_all(one, 10)
            await one.ack(first)
            assert ids(await read_all(two, 10)) == ids(first) == ids_of(messages(10))

    async def test_consumers_of_a_group_share_the_messages(self, server: BusServer) -> None:
        """Each message goes to one of them."""
        async with connections(server) as connect:
            one, two = await connect.join(consumer="one"), await connect.join(consumer="two")
            await connect.bus().publish(messages(10))
            first = await one.read(5, WAIT_MS)
            second = await two.read(100, WAIT_MS)
            assert len(first) == 5
            assert ids(first) + ids(second) == ids_of(messages(10))
            await nothing_more(one)
            await nothing_more(two)

    async def test_late_group_starts_at_the_first_message_kept(self, server: BusServer) -> None:
        """Never at "now", whether the topic was read by others or by nobody."""
        async with connections(server) as connect:
            bus = connect.bus()
            await bus.publish(messages(3))
            early = await connect.join("early")
            await early.ack(await read_all(early, 3))
            await bus.publish(messages(2, start=3))
            late = await connect.join("late")
            assert ids(await read_all(late, 5)) == ids_of(messages(5))

    async def test_joining_again_does_not_start_again(self, server: BusServer) -> None:
        """A group that exists stays where it is."""
        async with connections(server) as connect:
            first = await connect.join(consumer="one")
            await connect.bus().publish(messages(3))
            await first.ack(await read_all(first, 3))
            second = await connect.join(consumer="two")
            await nothing_more(second)

    # --- what is pending --------------------------------------------------------------------------

    async def test_own_pending_entries_come_first_after_joining(self, server: BusServer) -> None:
        """Of each topic all of them, in order, then the new ones, and nothing twice."""
        topics = ("a", "b")
        async with connections(server) as connect:
            before, bus = await connect.join(topics=topics), connect.bus()
            await bus.publish(messages(25, "a") + messages(3, "b"))
            handed = await read_all(before, 28)
            a_entries = [d for d in handed if d.topic == "a"]
            await before.ack(a_entries[:5])
            await before.close()
            await bus.publish(messages(2, "a", start=25))
            again = await connect.join(topics=topics)
            found = await read_all(again, 25, limit=10)
            of = {topic: [d for d in found if d.topic == topic] for topic in topics}
            assert ids(of["a"]) == ids_of(messages(22, "a", start=5))
            assert [d.attempt for d in of["a"]] == [2] * 20 + [1, 1]
            assert ids(of["b"]) == ids_of(messages(3, "b"))
            assert [d.attempt for d in of["b"]] == [2] * 3
            await nothing_more(again)

    async def test_acknowledged_entries_are_gone_for_the_group(self, server: BusServer) -> None:
        """They are neither own pending entries nor reclaimed; acknowledging twice is no error."""
        async with connections(server) as connect:
            subscription = await connect.join()
            await connect.bus().publish(messages(5))
            found = await read_all(subscription, 5)
            await subscription.ack(found)
            await subscription.ack(found)
            await subscription.ack([])
            await subscription.close()
            again = await connect.join()
            await nothing_more(again)
            assert await again.reclaim(0, 100) == []

    async def test_entries_of_a_dead_consumer_are_reclaimed(self, server: BusServer) -> None:
        """By another one, which may acknowledge them."""
        async with connections(server) as connect:
            dead, heir = await connect.join(consumer="dead"), await connect.join(consumer="heir")
            await connect.bus().publish(messages(30))
            await read_all(dead, 30)
            await dead.close()
            await nothing_more(heir)
            found = await reclaim_all(heir, 30, limit=7)
            assert ids(found) == ids_of(messages(30))
            assert {d.attempt for d in found} == {2}
            await heir.ack(found)
            assert await heir.reclaim(0, 100) == []

    async def test_entries_in_work_are_not_reclaimed(self, server: BusServer) -> None:
        """Before they were left alone for the given time."""
        async with connections(server) as connect:
            busy, other = await connect.join(consumer="busy"), await connect.join(consumer="other")
            await connect.bus().publish(messages(3))
            await read_all(busy, 3)
            assert await other.reclaim(60_000, 100) == []

    async def test_attempt_counts_the_hand_outs(self, server: BusServer) -> None:
        """By reading, reclaiming and reading again."""
        async with connections(server) as connect:
            first = await connect.join()
            await connect.bus().publish([message(1)])
            attempts = [d.attempt for d in await read_all(first, 1)]
            attempts += [d.attempt for d in await reclaim_all(first, 1)]
            await first.close()
            second = await connect.join()
            attempts += [d.attempt for d in await read_all(second, 1)]
            attempts += [d.attempt for d in await reclaim_all(second, 1)]
            assert attempts == [1, 2, 3, 4]

    async def test_late_acknowledgement_after_a_reclaim_counts(self, server: BusServer) -> None:
        """The effects are committed, whoever holds the entry now."""
        async with connections(server) as connect:
            slow, heir = await connect.join(consumer="slow"), await connect.join(consumer="heir")
            await connect.bus().publish(messages(2))
            found = await read_all(slow, 2)
            await reclaim_all(heir, 2)
            await slow.ack(found)
            assert await heir.reclaim(0, 100) == []

    # --- what is no message -----------------------------------------------------------------------

    async def test_entry_that_is_no_message_comes_with_a_fault(self, server: BusServer) -> None:
        """It stops nobody, and can be acknowledged."""
        strange: list[Mapping[bytes, bytes]] = [
            {b"hello": b"world"},
            {b"id": b"\xff\xfe", b"type": b"t", b"data": b"{}"},
            {b"id": b"x" * 5000, b"type": b"t", b"data": b"{}"},
            {b"id": b"1", b"type": b"t", b"data": b"{}", b"hops": b"many"},
            {b"\x00\xff": b"\x00\xff"},
        ]
        async with connections(server) as connect:
            subscription, bus = await connect.join(), connect.bus()
            await bus.publish([message(1)])
            for fields in strange:
                await server.put_fields(TOPIC, fields)
            await bus.publish([message(2)])
            found = await read_all(subscription, len(strange) + 2)
            assert (ids(found)[0], ids(found)[-1]) == (f"{TOPIC}-1", f"{TOPIC}-2")
            for delivery in found[1:-1]:
                assert delivery.envelope is None
                assert delivery.fault.startswith("undecodable: "), delivery.fault
                assert delivery.raw
            await subscription.ack(found)
            assert await subscription.reclaim(0, 100) == []

    async def test_foreign_message_with_the_needed_fields_is_read(self, server: BusServer) -> None:
        """Fields nobody knows do no harm."""
        fields = {b"id": b"f-1", b"type": b"x.Y", b"data": b'{"a":1}', b"extra": b"\xff"}
        async with connections(server) as connect:
            subscription = await connect.join()
            await server.put_fields(TOPIC, fields)
            (found,) = await read_all(subscription, 1)
        assert found.envelope == Envelope(id="f-1", type="x.Y", topic=TOPIC, body=b'{"a":1}')

    async def test_oversized_entry_comes_with_a_fault(self, server: BusServer) -> None:
        """Its body is not decoded, and `raw` is no larger than the limit."""
        body = b"x" * (server.payload_bytes_max * 2 + 200_000)
        async with connections(server) as connect:
            subscription = await connect.join()
            await server.put_fields(TOPIC, {b"id": b"1", b"type": b"t", b"data": body})
            (found,) = await read_all(subscription, 1)
        assert found.envelope is None
        assert found.fault.startswith("oversized: "), found.fault
        assert 0 < len(found.raw) < server.payload_bytes_max + 10_000

    async def test_pending_entry_whose_payload_is_gone_comes_with_a_fault(
        self, server: BusServer
    ) -> None:
        """When read again after joining; once acknowledged it is gone for good."""
        async with connections(server) as connect:
            before = await connect.join()
            await connect.bus().publish(messages(3))
            handed = await read_all(before, 3)
            await before.close()
            await server.delete(TOPIC, handed[1].entry_id)
            again = await connect.join()
            found = await read_all(again, 3)
            assert ids(found)[::2] == [f"{TOPIC}-0", f"{TOPIC}-2"]
            assert (found[1].envelope, found[1].entry_id) == (None, handed[1].entry_id)
            assert found[1].fault.startswith("lost: "), found[1].fault
            await again.ack(found)
            assert await again.reclaim(0, 100) == []

    async def test_reclaimed_entry_whose_payload_is_gone_comes_with_a_fault(
        self, server: BusServer
    ) -> None:
        """Each of them, whichever place it has."""
        async with connections(server) as connect:
            dead, heir = await connect.join(consumer="dead"), await connect.join(consumer="heir")
            await connect.bus().publish(messages(6))
            handed = await read_all(dead, 6)
            await dead.close()
            gone = {handed[index].entry_id for index in (0, 3, 5)}
            for entry_id in gone:
                await server.delete(TOPIC, entry_id)
            found = await reclaim_all(heir, 6)
            lost = [d for d in found if d.envelope is None]
            assert {d.entry_id for d in lost} == gone
            assert all(d.fault.startswith("lost: ") for d in lost), ids(lost)
            kept = [d for d in found if d.envelope is not None]
            assert ids(kept) == [f"{TOPIC}-{number}" for number in (1, 2, 4)]
            await heir.ack(found)
            assert await heir.reclaim(0, 100) == []

    # --- the end ----------------------------------------------------------------------------------

    async def test_check_of_a_good_server_reaches_it(self, server: BusServer) -> None:
        """It returns lines of text, never raises for a server that answers."""
        async with connections(server) as connect:
            lines = await connect.bus().check()
        assert "" not in lines

    async def test_closing_twice_is_fine(self, server: BusServer) -> None:
        """Subscriptions and buses, in any order, and a waiting read ends."""
        async with connections(server) as connect:
            bus = connect.bus()
            subscription = await bus.join("g", "c", (TOPIC,))
            found: list[Delivery] = []
            with anyio.fail_after(WAIT_MS / 1000):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read_into, subscription, found)
                    await anyio.wait_all_tasks_blocked()
                    await subscription.close()
            await subscription.close()
            await bus.close()
            await bus.close()
        assert found == []


async def error_of(call: Awaitable[object]) -> str:
    """The text of the BusError that `call` raises."""
    try:
        await call
    except BusError as error:
        return str(error)
    raise AssertionError("expected BusError")


async def read_into(subscription: Subscription, found: list[Delivery]) -> None:
    """One long read, for a task."""
    found += await subscription.read(100, WAIT_MS)


def ids_of(envelopes: Sequence[Envelope]) -> list[str]:
    """The message ids."""
    return [envelope.id for envelope in envelopes]
