"""One worker process of a service: everything that runs, and how it starts and stops.

    bus entries ---+
    due timeouts --+--> Cycle: load, decide, commit, publish, acknowledge
    due parked ----+
    parked work -----> Participants: run handlers, finish
    outbox ----------> Relay: sweep what has not left
    old rows --------> Janitor

A stop drains: nothing new is read, what runs is finished, committed and acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

import anyio
import anyio.lowlevel
import msgspec

from sagacity.core.decide import Sender
from sagacity.core.delivery import Delivery
from sagacity.core.errors import BusError, BusUnavailable, StoreError, Unavailable
from sagacity.core.routing import Retry
from sagacity.ports import Due, Observer, PendingRow, Subscription
from sagacity.service import Service
from sagacity.worker.config import Settings
from sagacity.worker.cycle import Cycle, Settled
from sagacity.worker.intake import Intake, Taken, may_kill
from sagacity.worker.janitor import Janitor
from sagacity.worker.opening import WholeBus, WholeStore, until_reachable
from sagacity.worker.participants import Participants
from sagacity.worker.recovery import Recovery
from sagacity.worker.redaction import redacted
from sagacity.worker.relay import Relay
from sagacity.worker.sorting import Input, Sorted, behind, due_inputs

log = logging.getLogger(__name__)

T = TypeVar("T")

TRIES_ALONE_MAX = 2
"""An entry that was run alone this often, by processes that all ended, is a dead letter, undecoded.

Only these tries count: an entry is handed out again for many reasons, such as another entry of its
batch, or a store that was away (``protocol.md`` row 22)."""
TRIED_KEPT = 10_000
"""How many entries that it has run alone a process remembers."""
BUSY_ROUNDS_MAX = 5
"""Rounds of a few milliseconds before one of the held instances is waited for."""
FORGET_AFTER_S = 0.05
"""Published rows are forgotten with the next commit, or after this long without one."""
FORGET_ROUNDS_MAX = 5
"""So often this time passes where a batch is under way: it may take long, and a relay must not send
again what has left."""


class Worker:
    """Runs one service until it is told to stop.

    `consumer` names this process in its consumer group; a name that stays the same over restarts
    finds its own unfinished entries at once, any other name has them reclaimed.
    """

    def __init__(
        self,
        service: Service,
        store: WholeStore,
        bus: WholeBus,
        settings: Settings,
        *,
        observer: Observer | None = None,
        consumer: str = "",
    ) -> None:
        self.service, self.store, self.bus, self.settings = service, store, bus, settings
        self.observer = observer
        self.consumer = consumer or settings.consumer or f"{socket.gethostname()}-{os.getpid()}"
        retry = Retry(
            attempts_max=settings.attempts_max,
            base_us=settings.backoff_base_ms * 1000,
            cap_us=int(settings.backoff_cap_s * 1e6),
            missing_us=int(settings.missing_window_s * 1e6),
        )
        catalog = service.catalog(Sender(service.name, limits=settings.limits), retry)
        self.cycle = Cycle(service, catalog, store, bus, observer=observer)
        self.relay = Relay(
            store, bus, store.clock, age_us=settings.pending_age_ms * 1000, observer=observer
        )
        self.janitor = Janitor(
            store,
            settings.retention,
            bus=bus,
            group=service.name,
            topics=sorted(service.topics),
            stream_us=int(settings.stream_hours * 3_600_000_000),
        )
        self.recovery = Recovery(
            store,
            bus,
            store.clock,
            lambda: self.cycle.published_to,
            margin_us=2 * max(settings.batch_deadline_ms * 1000, 30_000_000),
            retention_us=settings.retention.outbox_us,
            suspected=self.cycle.lost,
            republished=self._republished,
            observer=observer,
        )
        self.participants = Participants(
            service,
            store,
            store.clock,
            self._publish_of_participants,
            retry=retry,
            concurrency=settings.concurrency,
            per_handler=settings.concurrency_per_handler,
            lease_us=int(settings.lease_s * 1e6),
            gap_us=int(settings.sequence_gap_s * 1e6),
            observer=observer,
        )
        self._stopping = anyio.Event()
        self._scope = anyio.CancelScope()
        self._subscription: Subscription | None = None
        self._intake = Intake()
        self._intake_ended = False
        self._free: list[asyncio.Future[Taken | None]] = []
        """Who waits for a batch to run."""
        self._changed = anyio.Event()
        """A batch ended, or something is due."""
        self._reading = False
        self._read_again_at = 0.0
        """No sooner is a bus asked that could not be reached."""
        self._began: dict[object, float] = {}
        """When each batch under way began, or last heard from its store."""
        self._away: set[object] = set()
        """Batches that wait for their store."""
        self._store_left = False
        """True once a stop has given up waiting for the store."""
        self._due_open: set[int] = set()
        """Due inputs, by identity, that were in no batch yet."""
        self._due_settled = anyio.Event()
        self._tried: set[tuple[str, str]] = set()
        """Entries (topic, entry id) that this process has run alone."""
        self._clock_wake = anyio.Event()
        self._done: list[Delivery] = []
        """Committed entries that are to be acknowledged."""
        self._done_wake = anyio.Event()
        self._read_ended = False
        self._joined = False
        self._progress_at = time.monotonic()
        self._reclaim_at = 0.0
        self._bytes_per_message = 1024.0
        self._counts: dict[str, int] = {}

    # ------------------------------------------------------------------------------------- control

    def stop(self) -> None:
        """Drains: reads nothing new, finishes what runs; `run` then returns. Call from its loop."""
        self._stopping.set()
        self._changed.set()
        self._due_settled.set()
        self._clock_wake.set()
        self.participants.stop()
        self.relay.stop()
        self.recovery.stop()
        self.janitor.stop()
        if self._subscription is not None:
            self._subscription.wake()

    def kill(self) -> None:
        """Ends `run` now; what was not committed is done again by another worker."""
        self.stop()
        self._scope.cancel()

    @property
    def ready(self) -> bool:
        """True once it has joined its group on a checked schema, until it is told to stop."""
        return self._joined and not self._stopping.is_set()

    def report(self) -> dict[str, object]:
        """Live figures: outcomes so far, tasks running, and seconds since the loop last moved, or
        since the oldest of the batches under way did.
        """
        moved_at = min([self._progress_at, *self._began.values()])
        return {
            "service": self.service.name,
            "consumer": self.consumer,
            "running": len(self.participants.running),
            "idle_s": round(time.monotonic() - moved_at, 3),
            **self._counts,
        }

    # ----------------------------------------------------------------------------------------- run

    async def run(self) -> None:
        """Works until `stop`.

        Servers that are away at the start are waited for. Raises SchemaError for tables that are
        missing or do not fit the code, and what the service's lifespan raises.
        """
        with self._scope:
            async with AsyncExitStack() as stack:
                if not await self._open(stack):
                    return
                try:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._watch_the_clock)
                        tasks.start_soon(self._forget_published)
                        tasks.start_soon(self.relay.run, self.settings.sweep_interval_ms / 1000)
                        tasks.start_soon(self.recovery.run)
                        tasks.start_soon(self.janitor.run, self.settings.cleaning_interval_s)
                        if self.participants.limits:
                            tasks.start_soon(self.participants.run)
                        tasks.start_soon(self._acknowledge)
                        await self._read_until_stopped()
                        self._read_ended = True
                        self._done_wake.set()
                        self.relay.stop()
                    await self._forget_the_last()
                finally:
                    self._joined = False

    async def _open(self, stack: AsyncExitStack) -> bool:
        where = redacted(self.settings.store)
        await self._wait_for("store", where, self.store.prepare)
        if self._stopping.is_set():
            return False
        if self.service.lifespan is not None:
            self.participants.state = await stack.enter_async_context(
                self.service.lifespan(self.service)
            )
        subscription = await self._wait_for(
            "bus",
            redacted(self.settings.bus),
            lambda: self.bus.join(self.service.name, self.consumer, self.service.topics),
        )
        if subscription is None:
            return False
        stack.push_async_callback(subscription.close)
        self._subscription = subscription
        self._joined = True
        log.info(
            "Worker joined its group",
            extra={"service": self.service.name, "consumer": self.consumer},
        )
        return True

    async def _wait_for(
        self, name: str, where: str, attempt: Callable[[], Awaitable[T]]
    ) -> T | None:
        return await until_reachable(name, where, attempt, stopping=self._stopping)

    # ------------------------------------------------------------------------------------ the loop

    async def _read_until_stopped(self) -> None:
        """Reads while batches run, as many at a time as may; returns when all are done."""
        subscription = self._subscription
        assert subscription is not None
        async with anyio.create_task_group() as runners:
            for _ in range(self.settings.batches_max):
                runners.start_soon(self._run_batches)
            await anyio.lowlevel.checkpoint()
            while not self._stopping.is_set() or len(self._intake):
                self._changed = anyio.Event()
                if self._start_batches():
                    # They first: their way to the database is longer than ours to the bus.
                    await anyio.lowlevel.checkpoint()
                room = self._room()
                pause_s = self._read_again_at - time.monotonic()
                if room > 0 and pause_s <= 0 and not self._stopping.is_set():
                    self._take_in(await self._read(subscription, room))
                    continue
                with anyio.move_on_after(pause_s if room > 0 and pause_s > 0 else None):
                    await self._changed.wait()
            self._intake_ended = True
            while runner := self._free_runner():
                runner.set_result(None)

    async def _run_batches(self) -> None:
        """Runs one batch after the other as they are handed out."""
        loop = asyncio.get_running_loop()
        while not self._intake_ended:
            runner: asyncio.Future[Taken | None] = loop.create_future()
            self._free.append(runner)
            batch = await runner
            if batch is None:
                return
            await self._run(batch)

    def _start_batches(self) -> bool:
        """Hands batches to whoever is free to run one; False where there is none, or nobody."""
        self._progress_at = time.monotonic()
        started = False
        while runner := self._free_runner():
            batch = self._intake.take(self.settings.batch_max)
            if batch is None:
                self._free.append(runner)
                break
            runner.set_result(batch)
            started = True
        return started

    def _free_runner(self) -> asyncio.Future[Taken | None] | None:
        while self._free:
            runner = self._free.pop()
            if not runner.done():  # or it was cancelled, and does not know it yet
                return runner
        return None

    def _room(self) -> int:
        """How many more entries may be held beside the batches that run."""
        if self._intake.alone or self._away:
            # What is read is decoded, which may be what ends the process. And what waits here for a
            # store that is away is handed out again and again, until it looks like a killer.
            return 0
        held, most = self._intake.held, self.settings.batch_max
        by_bytes = int(self.settings.in_flight_bytes_max / self._bytes_per_message) - held
        return max(min(most - len(self._intake), by_bytes), 0 if held else 1)

    def _take_in(self, inputs: Iterable[Input]) -> list[Sorted]:
        # To sort an input is to decode it: `_suspected` notes the try before that.
        found = [Sorted(one) if may_kill(one) else self.cycle.sort(one) for one in inputs]
        self._intake.add(found)
        return found

    def _wake_loop(self) -> None:
        self._changed.set()
        if self._reading and self._subscription is not None:
            self._subscription.wake()

    async def _run(self, batch: Taken) -> None:
        """One batch to its end, and what another worker held of it once more, later."""
        inputs = batch.inputs
        busy: list[Sorted] = []
        patient = [one for one in inputs if one.tries > BUSY_ROUNDS_MAX][:1]
        if patient and not batch.alone:
            # One message waits, so that at least one gets on; all others need not wait with it.
            busy = await self._settle(patient, wait=True)
            rest = [one for one in inputs if one is not patient[0]]
            held, inputs = behind(busy, rest)
            busy += held
            for one in busy:
                one.tries = 0  # it has had its wait; all others need not wait each time
        if inputs:
            busy += await self._settle(inputs, alone=batch.alone)
        for one in busy:
            one.tries += 1
        if busy:
            await anyio.sleep(random.uniform(0.003, 0.010))
        if self._stopping.is_set():
            busy = []  # left to another worker: who knows how long they are held
        self._intake.done(batch, busy)
        self._due_open.difference_update(map(id, batch.inputs))
        if not self._due_open:
            self._due_settled.set()
        self._wake_loop()

    async def _read(self, subscription: Subscription, room: int) -> list[Delivery]:
        """Up to `room` new entries."""
        settings = self.settings
        self._reading = True
        try:
            fresh = await subscription.read(room, settings.read_block_ms)
            if settings.batch_wait_ms and 0 < len(fresh) < room:
                await self._pause(settings.batch_wait_ms / 1000)
                fresh += await subscription.read(room - len(fresh), 0)
            if time.monotonic() >= self._reclaim_at and not self._away:
                fresh += await subscription.reclaim(settings.reclaim_idle_ms, room)
                pause_s = settings.reclaim_interval_ms / 1000
                self._reclaim_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)
        except BusUnavailable as error:
            log.warning("Bus cannot be reached", extra={"error": str(error)})
            self._read_again_at = time.monotonic() + random.uniform(0.5, 1.0)
            return []
        finally:
            self._reading = False
        for delivery in fresh:
            size = len(delivery.envelope.body) if delivery.envelope else len(delivery.raw)
            # Rises at once and falls slowly: large messages come in droves.
            self._bytes_per_message = max(size, 0.99 * self._bytes_per_message, 1.0)
        return fresh

    async def _settle(
        self, inputs: list[Sorted], *, wait: bool = False, alone: bool = False
    ) -> list[Sorted]:
        """Commits a batch, whatever it takes; returns what another worker holds.

        The same batch is run again until its outcome is known: a commit whose answer was lost is
        recognised by its own inbox rows. With `alone` its one entry may be what ends the process.
        """
        batch = object()
        self._began[batch] = time.monotonic()
        try:
            return await self._settled(batch, inputs, wait=wait, alone=alone)
        finally:
            del self._began[batch]
            self._away.discard(batch)

    async def _settled(
        self, batch: object, inputs: list[Sorted], *, wait: bool, alone: bool
    ) -> list[Sorted]:
        pause = 0.05
        while True:
            try:
                if alone:
                    inputs, alone = [await self._suspected(one) for one in inputs], False
                return await self._settle_shielded(inputs, wait=wait)
            except StoreError as error:
                # It lives, its store does not.
                self._progress_at = self._began[batch] = time.monotonic()
                away = isinstance(error, Unavailable)
                if self._stopping.is_set():
                    self._store_left = self._store_left or away
                    # What waits would find its store away too, one batch after the other.
                    left = len(inputs) + (self._intake.give_up() if away else 0)
                    log.warning("Batch is left to another worker", extra={"inputs": left})
                    return []
                if away:
                    self._away.add(batch)
                elif batch in self._away:
                    self._away.discard(batch)
                    self._wake_loop()
                level = logging.WARNING if away else logging.ERROR
                log.log(
                    level,
                    "Batch cannot be committed, it is run again",
                    extra={"inputs": len(inputs), "pause_s": pause, "error": str(error)},
                )
                await self._pause(pause)
                pause = min(2 * pause, 10.0)

    async def _suspected(self, one: Sorted) -> Sorted:
        """Notes that an entry is tried alone; a fault where that has ended processes before."""
        delivery = one.input
        if not isinstance(delivery, Delivery) or delivery.envelope is None:
            return self.cycle.sort(delivery)
        entry = (delivery.topic, delivery.entry_id)
        if entry in self._tried:
            # By this process, which lives.
            return one if one.tries else self.cycle.sort(delivery)
        tries = await self.cycle.note_try(delivery, TRIES_ALONE_MAX)
        if len(self._tried) >= TRIED_KEPT:
            self._tried.clear()
        self._tried.add(entry)
        if tries < TRIES_ALONE_MAX:
            return self.cycle.sort(delivery)
        text = (
            f"handed out {delivery.attempt} times, {tries} times run alone, and never acknowledged: it "
            "ends the process that works on it; it was not decoded"
        )
        return self.cycle.sort(msgspec.structs.replace(delivery, fault=text))

    async def _settle_shielded(self, inputs: list[Sorted], *, wait: bool) -> list[Sorted]:
        # A cancelled commit says nothing about its outcome (protocol.md M2).
        busy: list[Sorted] = []
        began = time.monotonic()
        with anyio.CancelScope(shield=True):
            settled = await self.cycle.settle(inputs, wait=wait)
            await self._after(settled)
            busy = settled.busy
        took_ms = (time.monotonic() - began) * 1000
        if took_ms > self.settings.batch_deadline_ms:
            # Beyond three times this long other workers take the messages over.
            log.warning(
                "Batch took longer than its deadline",
                extra={"inputs": len(inputs), "took_ms": round(took_ms)},
            )
        return busy

    async def _after(self, settled: Settled) -> None:
        for outcome, count in settled.outcomes.items():
            self._counts[str(outcome)] = self._counts.get(str(outcome), 0) + count
        # Before publishing: it may be answered before the acknowledgement is on its way.
        self._done += settled.done
        self._done_wake.set()
        await self.cycle.publish(settled.pending)
        if settled.work:
            self.participants.notify()
        if settled.due:
            self._clock_wake.set()

    async def _acknowledge(self) -> None:
        """Acknowledges what batches have done, beside the next batches; ends when all is told."""
        assert self._subscription is not None
        while self._done or not self._read_ended:
            self._done_wake = anyio.Event()
            if not self._done:
                await self._done_wake.wait()
                continue
            done, self._done = self._done, []
            try:
                with anyio.CancelScope(shield=True):
                    await self._subscription.ack(done)
            except BusError as error:
                # They come again and are recognised.
                log.warning(
                    "Acknowledging failed", extra={"messages": len(done), "error": str(error)}
                )

    async def _watch_the_clock(self) -> None:
        """Brings due timeouts and parked messages to the loop."""
        poll_us = self.settings.timeouts_poll_ms * 1000
        saga_types = list(self.service.sagas)
        if not saga_types:
            return
        while not self._stopping.is_set():
            wait_us = poll_us
            self._clock_wake = anyio.Event()
            missed = self.cycle.missed
            try:
                due: Due = await self.store.due(saga_types, self.settings.batch_max)
            except StoreError as error:
                await self._wait_out("Store cannot be asked for due timeouts", error)
                continue
            inputs = due_inputs(due)
            if self.cycle.missed == missed:
                self.cycle.waiting = bool(inputs) or due.next_at is not None
            if self._stopping.is_set():
                return  # the loop has ended: nobody would take them, and tell
            if inputs:
                self._due_settled = anyio.Event()
                self._due_open = set(map(id, self._take_in(inputs)))
                self._wake_loop()
                await self._due_settled.wait()
                wait_us = 5_000  # held instances come again by themselves
            elif due.next_at is not None:
                wait_us = min(poll_us, max(due.next_at - self.store.clock.now(), 1_000))
            with anyio.move_on_after(wait_us / 1e6):
                await self._clock_wake.wait()

    async def _forget_published(self) -> None:
        """Forgets published rows when no batch comes to do it on the way."""
        oldest: list[int] = []
        rounds = 0
        while not self._stopping.is_set() or (self._intake.running and not self._store_left):
            await self._pause(FORGET_AFTER_S)
            first = self.cycle.published[:1]
            rounds = rounds + 1 if first == oldest else 0
            oldest = first
            if self._intake.held and rounds < FORGET_ROUNDS_MAX:
                continue  # the next batch does it on its way
            try:
                await self.cycle.forget_published()
            except StoreError as error:
                self._store_left = self._stopping.is_set()
                log.debug("Published rows are forgotten later", extra={"error": str(error)})

    async def _forget_the_last(self) -> None:
        """Forgets what was published until the end of a stop."""
        try:
            if not self._store_left:
                await self.cycle.forget_published()
        except StoreError as error:
            self._store_left = True
            log.debug("Published rows are not forgotten", extra={"error": str(error)})
        if self.cycle.published:
            log.warning(
                "Published rows are left to the relay", extra={"rows": len(self.cycle.published)}
            )

    async def _publish_of_participants(self, pending: Sequence[PendingRow]) -> None:
        await self.cycle.publish(pending)

    def _republished(self, rows: int) -> None:
        del rows  # some were not forgotten yet, and are pending as they were
        self.relay.notify()

    async def _pause(self, seconds: float) -> None:
        """Waits, unless the worker is to stop."""
        with anyio.move_on_after(seconds):
            await self._stopping.wait()
            # Once stopping, a retry must not spin.
            await anyio.sleep(min(seconds, 0.01))

    async def _wait_out(self, what: str, error: Exception) -> None:
        log.warning(what, extra={"error": str(error)})
        await self._pause(random.uniform(0.5, 1.0))
