"""The same services, run to the end in one process, with no server and no waiting.

    async with Inline(service) as app:
        await app.publish(OrderPlaced("o1"))
        await app.run()
        assert (await app.saga(OrderSaga, "o1")).state == "paid"

What runs is the worker's own code: the same batches, participants, retries, timeouts and relay, on
the memory backends (or on any store and bus that are given). Only the clock is virtual: it stands
still until `advance`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from types import TracebackType
from typing import Generic, Self, TypeVar, cast
from uuid import uuid4

import msgspec

from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.core.decide import Sender
from sagacity.core.delivery import Envelope, enveloped
from sagacity.core.instance import Instance
from sagacity.core.messages import Command, Event, Message, message_type
from sagacity.core.plan import OutboxRow, TransitionRow
from sagacity.core.routing import Retry
from sagacity.core.saga import Saga
from sagacity.ports import Bus, DeadLetter, PendingRow, Subscription
from sagacity.recording import current_origin, recording_time
from sagacity.service import Service
from sagacity.testing.clock import VirtualClock
from sagacity.worker.cycle import Cycle
from sagacity.worker.opening import WholeStore
from sagacity.worker.participants import Participants
from sagacity.worker.relay import Relay
from sagacity.worker.sorting import due_inputs

__all__ = ["Inline", "Seen"]

M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=Saga)

ROUNDS_MAX = 10_000
"""Rounds of `Inline.run` before it says that the services go in circles."""


class Seen(msgspec.Struct, Generic[S], frozen=True):
    """A saga instance as a test looks at it."""

    saga: S
    """Its data: an object of the saga class. Changing it changes nothing."""
    instance: Instance

    @property
    def state(self) -> str:
        """Name of its state."""
        return self.instance.state

    @property
    def status(self) -> str:
        """running, compensating, stuck, completed or compensated."""
        return str(self.instance.status)

    @property
    def pending(self) -> list[str]:
        """Type names of its unanswered commands, oldest first."""
        return [command.type for command in self.instance.ledger.pending.values()]

    @property
    def timeouts(self) -> dict[str, int]:
        """Armed timeouts: name -> due time in microseconds."""
        return {name: armed.due_at for name, armed in self.instance.ledger.timeouts.items()}


class _Recorded:
    """A bus that remembers what it was given."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.published: list[Envelope] = []

    async def publish(self, envelopes: Sequence[Envelope]) -> None:
        await self.bus.publish(envelopes)
        self.published.extend(envelopes)

    async def join(self, group: str, consumer: str, topics: Collection[str]) -> Subscription:
        return await self.bus.join(group, consumer, topics)

    async def check(self) -> list[str]:
        return await self.bus.check()

    async def close(self) -> None:
        await self.bus.close()


class _Running(msgspec.Struct):
    """One service at work."""

    service: Service
    cycle: Cycle
    participants: Participants
    subscription: Subscription


class Inline:
    """Runs services step by step until nothing moves.

    Without `store` and `bus` everything is in memory. A given store must take its time from `clock`.
    A participant that fails is tried again when `advance` passes its backoff, as in production.
    """

    def __init__(
        self,
        *services: Service,
        store: WholeStore | None = None,
        bus: Bus | None = None,
        clock: VirtualClock | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.services = services
        self.clock = clock or VirtualClock()
        self.store: WholeStore = store or MemoryStore(clock=self.clock)
        self.bus = _Recorded(bus or MemoryBus())
        self.retry = retry or Retry()
        self.relay = Relay(self.store, self.bus, self.clock)
        self._running: list[_Running] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        self._stack.enter_context(recording_time(self.clock.now))
        await self.store.prepare(create=True)
        for service in self.services:
            state = None
            if service.lifespan is not None:
                state = await self._stack.enter_async_context(service.lifespan(service))
            catalog = service.catalog(Sender(service.name), self.retry)
            cycle = Cycle(service, catalog, self.store, self.bus)

            async def publish(pending: Sequence[PendingRow], cycle: Cycle = cycle) -> None:
                await cycle.publish(pending)

            participants = Participants(
                service, self.store, self.clock, publish, retry=self.retry, state=state
            )
            subscription = await self.bus.join(service.name, "inline", service.topics)
            self._stack.push_async_callback(subscription.close)
            self._running.append(_Running(service, cycle, participants, subscription))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    # -------------------------------------------------------------------------------------- doing

    async def publish(self, event: Event, *, message_id: str = "") -> str:
        """Puts an event on the bus; returns its message id. The same id again is a duplicate."""
        return await self._put(event, message_id)

    async def send(self, command: Command, *, message_id: str = "") -> str:
        """Puts a command on the bus; returns its command id."""
        return await self._put(command, message_id)

    async def start(self, saga: type[Saga], event: Event, *, key: object | None = None) -> str:
        """Starts an instance as `Service.start` does; returns its key."""
        service = next(s for s in self.services if saga.__definition__.saga_type in s.sagas)
        row = service.starting(saga, event, key=key)
        await self.store.append([row])
        return row.envelope.saga_key

    async def deliver(self, envelope: Envelope) -> None:
        """Puts an envelope on the bus as it is."""
        await self.bus.publish([envelope])

    async def run(self) -> int:
        """Runs until nothing is left to do now; returns the number of rounds that moved something.

        Raises RuntimeError after `ROUNDS_MAX` rounds.
        """
        for count in range(ROUNDS_MAX):
            if not await self._round():
                return count
        raise RuntimeError(
            f"Inline.run: still moving after {ROUNDS_MAX} rounds; the services answer each other in a circle"
        )

    async def advance(self, time: timedelta) -> None:
        """Lets time pass: everything that falls due on the way happens at its own instant."""
        end = self.clock.now() + time // timedelta(microseconds=1)
        await self.run()
        while (due_at := await self._next_at()) is not None and due_at <= end:
            self.clock.set(max(due_at, self.clock.now()))
            if not await self.run():
                break
        self.clock.set(max(end, self.clock.now()))
        await self.run()

    # ------------------------------------------------------------------------------------- looking

    async def saga(self, saga: type[S], key: str) -> Seen[S]:
        """One instance. Raises LookupError where there is none."""
        definition = saga.__definition__
        instance = await self.store.saga(definition.saga_type, key)
        if instance is None:
            raise LookupError(f"no {definition.saga_type} with key {key!r}")
        return Seen(cast("S", definition.decode(instance.data)), instance)

    async def history(self, saga: type[Saga], key: str) -> list[TransitionRow]:
        """The transitions of an instance, oldest first."""
        return await self.store.history(saga.__definition__.saga_type, key)

    async def dead_letters(self) -> list[DeadLetter]:
        """Everything nobody will try again."""
        return await self.store.dead_letters(limit=1000)

    @property
    def published(self) -> list[Envelope]:
        """Every envelope that went over the bus, in order, copies included."""
        return list(self.bus.published)

    def messages(self, kind: type[M]) -> list[M]:
        """The messages of one class that went over the bus, in order, each id once."""
        decoder = msgspec.json.Decoder(kind)
        bodies = {
            envelope.id: envelope.body
            for envelope in self.bus.published
            if envelope.type == message_type(kind).name
        }
        return [decoder.decode(body) for body in bodies.values()]

    # ------------------------------------------------------------------------------------- private

    async def _put(self, message: Message, message_id: str) -> str:
        origin = current_origin()
        message_id = message_id or uuid4().hex
        envelope = enveloped(
            message,
            message_id=message_id,
            time=self.clock.now(),
            source=origin.source,
            correlation_id=origin.correlation_id or message_id,
            causation_id=origin.causation_id,
            actor=origin.actor,
        )
        await self.store.append([OutboxRow("", envelope)])
        await self.relay.sweep(age_us=0)
        return message_id

    async def _round(self) -> bool:
        moved = await self.relay.sweep(age_us=0) > 0
        for running in self._running:
            deliveries = await running.subscription.read(1000, 0)
            due = await self.store.due(list(running.service.sagas), 1000)
            inputs = [*due_inputs(due), *deliveries]
            if inputs:
                settled = await running.cycle.settle(inputs)
                await running.cycle.publish(settled.pending)
                await running.subscription.ack(settled.done)
                moved = True
            moved = bool(await running.participants.run_once()) or moved
            await running.cycle.forget_published()
        return moved

    async def _next_at(self) -> int | None:
        times = [
            (await self.store.due([t for r in self._running for t in r.service.sagas], 1)).next_at,
            await self.store.next_task_at(
                [c for r in self._running for c in r.participants.limits]
            ),
        ]
        known = [time for time in times if time is not None]
        return min(known) if known else None
