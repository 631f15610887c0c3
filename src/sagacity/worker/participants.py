"""Runs command handlers and subscribers on the messages parked for them.

A message is work: a row that one process holds under a lease. Many run at once, commands of one
saga instance one after the other (the store sees to it). A handler that used its session commits in
that session's transaction; the others are finished together, many in one.
"""

from __future__ import annotations

import logging
import math
import traceback
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, cast

import anyio
import anyio.abc
import msgspec

from sagacity.codec import encode_envelope
from sagacity.core.errors import (
    Conflict,
    DataRefused,
    DecodeError,
    Refused,
    StoreError,
    Unavailable,
)
from sagacity.core.messages import Event, encode_message
from sagacity.core.plan import DeadLetterRow, OutboxRow
from sagacity.core.routing import Retry
from sagacity.ports import Clock, Finish, Observer, PendingRow, Task, TaskStore, Work
from sagacity.recording import originating
from sagacity.service import Context, Participant, Service, failure, follow_ups, replies

log = logging.getLogger(__name__)

Publish = Callable[[Sequence[PendingRow]], Awaitable[object]]


class Participants:
    """Works on the parked messages of one service's handlers and subscribers.

    `concurrency` limits how many messages are worked on at once in this process; no consumer may take
    the last place of another, so a subscriber that stalls holds up nobody else. `per_handler` limits
    single handlers by name. `publish` is called with what a finished task left to send.
    """

    def __init__(
        self,
        service: Service,
        store: TaskStore,
        clock: Clock,
        publish: Publish,
        *,
        retry: Retry,
        concurrency: int = 16,
        per_handler: Mapping[str, int] | None = None,
        lease_us: int = 30_000_000,
        gap_us: int = 60_000_000,
        state: Any = None,
        observer: Observer | None = None,
    ) -> None:
        self.service, self.store, self.clock, self.publish = service, store, clock, publish
        self.retry = retry
        self.lease_us, self.gap_us, self.state, self.observer = lease_us, gap_us, state, observer
        consumers = service.consumers
        self.concurrency = max(concurrency, len(consumers))
        most = self.concurrency - (len(consumers) - 1)
        self.limits = {consumer: min(most, limit or most) for consumer, limit in consumers.items()}
        self._per_handler = dict(per_handler or {})
        self._limiters: dict[str, anyio.CapacityLimiter] = {}
        self.running: dict[tuple[str, str], Task] = {}
        self._finishes: list[Finish] = []
        self._wake = anyio.Event()
        self._finish_wake = anyio.Event()
        self._stopping = False

    # ------------------------------------------------------------------------------------- control

    def notify(self) -> None:
        """There may be something new to do."""
        self._wake.set()

    def stop(self) -> None:
        """Takes on nothing new; `run` returns when what runs has ended."""
        self._stopping = True
        self._wake.set()

    async def run(self, poll_us: int = 500_000) -> None:
        """Works until `stop`. Raises nothing for a server that is away: it waits."""
        try:
            async with anyio.create_task_group() as tasks:
                renewing = anyio.CancelScope()
                tasks.start_soon(self._renew, renewing)
                tasks.start_soon(self._finish_together)
                async with anyio.create_task_group() as handlers:
                    await self._claim_until_stopped(handlers, poll_us)
                self._finish_wake.set()
                renewing.cancel()
        finally:
            await self._give_back()

    async def _give_back(self) -> None:
        """Told to end at once: keeps what is done, and lets others have the rest now."""
        if not self._finishes:
            return
        with anyio.CancelScope(shield=True):
            try:
                await self.store.finish(self._finishes)
            except StoreError as error:
                log.warning(
                    "Work is left until its leases run out",
                    extra={"tasks": len(self._finishes), "error": str(error)},
                )

    async def _claim_until_stopped(self, handlers: anyio.abc.TaskGroup, poll_us: int) -> None:
        pause = 0.1
        while not self._stopping:
            self._wake = anyio.Event()
            try:
                claimed = await self.store.claim(self._free(), self.lease_us, self.gap_us)
                due_at = None if claimed else await self.store.next_task_at(self.limits)
            except StoreError as error:
                log.warning("No work can be taken on, tried again", extra={"error": str(error)})
                with anyio.move_on_after(pause):
                    await self._wake.wait()
                pause = min(2 * pause, 10.0)
                continue
            pause = 0.1
            for task in claimed:
                if not self._goes_on(task):
                    self.running[_key(task)] = task
                    handlers.start_soon(self._work, task)
            if not claimed:
                wait_us = poll_us
                if due_at is not None:
                    wait_us = min(poll_us, max(due_at - self.clock.now(), 1_000))
                with anyio.move_on_after(wait_us / 1e6):
                    await self._wake.wait()
            elif not any(self._free().values()):
                await self._wake.wait()

    def _goes_on(self, task: Task) -> bool:
        """True where the task is under way here already, though its lease ran out: now it has this one."""
        if task.tombstone:
            return False
        key = _key(task)
        waiting = [_key(finish.task) for finish in self._finishes]
        if key in waiting:
            place = waiting.index(key)
            ended = self._finishes[place]
            self._finishes[place] = msgspec.structs.replace(ended, task=task)
            return True
        if key in self.running:
            self.running[key] = task
            return True
        return False

    def _free(self) -> dict[str, int]:
        """Inbox name -> how many more of its messages may run now."""
        left = self.concurrency - len(self.running)
        used: dict[str, int] = {}
        for task in self.running.values():
            used[task.row.consumer] = used.get(task.row.consumer, 0) + 1
        free: dict[str, int] = {}
        for consumer, limit in self.limits.items():
            free[consumer] = max(0, min(left, limit - used.get(consumer, 0)))
        return free

    async def run_once(self) -> int:
        """Works on everything that is due now, one after the other; returns how many (inline mode)."""
        count = 0
        while claimed := await self.store.claim(
            dict.fromkeys(self.limits, 1), self.lease_us, self.gap_us
        ):
            for task in claimed:
                await self._work(task)
                await self._flush()
                count += 1
        return count

    # ---------------------------------------------------------------------------------------- work

    async def _work(self, task: Task) -> None:
        try:
            await self._try(task)
        except Conflict as error:
            log.warning(
                "Lease was lost, another worker has the message",
                extra={
                    "consumer": task.row.consumer,
                    "message_id": task.row.message_id,
                    "error": str(error),
                },
            )
        except Unavailable as error:
            # The lease runs out and the message is worked on again; its inbox guard is its own row.
            log.warning(
                "Store went away under a handler, the message is tried again",
                extra={
                    "consumer": task.row.consumer,
                    "message_id": task.row.message_id,
                    "error": str(error),
                },
            )
        except BaseException:
            # The process is asked to end: this was no attempt.
            task = self._leased(task)
            now = self.clock.now()
            self._finishes.append(Finish(task=task, retry_at=now, counts=False))
            raise
        finally:
            self.running.pop(_key(task), None)
            self._wake.set()

    def _leased(self, task: Task) -> Task:
        """The task under the lease it has now."""
        return self.running.get(_key(task), task)

    async def _try(self, task: Task) -> None:
        envelope = task.row.envelope
        participant = self.service.participant(task.row.consumer, envelope.type)
        if participant is None:
            self._later(
                self._dead(task, "unknown-type", f"nobody here handles {envelope.type} any more")
            )
            return
        retry = participant.retry or self.retry
        attempt = task.row.attempts + 1
        now = self.clock.now()
        if task.tombstone:
            reason = "its undo came first"
            self._later(self._refused(task, reason))
            return
        if attempt > retry.attempts_max:
            text = task.row.error or "the process that worked on it ended each time"
            self._later(self._failed(task, retry, text, attempt - 1))
            return
        try:
            message = self.service.decode(envelope)
        except DecodeError as error:
            self._later(self._dead(task, "mistyped", str(error)))
            return
        async with self.store.work(task) as work:
            opened = _Opened(work)
            context = Context(
                envelope,
                attempt=attempt,
                now=now,
                source=self.service.name,
                session=opened,
                state=self.state,
            )
            arguments = (message, context) if participant.takes_context else (message,)
            finish: Finish
            try:
                # What entities recorded is written as the session finishes: it has the same origin.
                with originating(context.origin):
                    async with self._place_of(participant):
                        result = await _limited(participant, arguments)
                    task = self._leased(task)
                    finish = self._done(task, participant, context, result)
                    if opened.used:
                        pending = await work.finish(finish)
                        self._notice(task, "done")
                        await self.publish(pending)
                        return
            except (Conflict, Unavailable):
                raise
            except Refused as error:
                finish = self._refused(self._leased(task), error.reason)
            except (Exception, SystemExit, CancelledError) as error:
                # A handler may raise anything; also what it got from a task of its own that was
                # cancelled, which must not end the others here.
                if isinstance(error, CancelledError) and _ending():
                    raise
                finish = self._failed(self._leased(task), retry, _traceback(error), attempt)
        # The session, if any, was rolled back with its context.
        self._later(finish)

    def _place_of(self, participant: Participant) -> AbstractAsyncContextManager[object]:
        """One of the places of a handler that may not run as often as it likes."""
        limit = self._per_handler.get(participant.name, participant.concurrency)
        if limit is None:
            return nullcontext()
        limiter = self._limiters.get(participant.name)
        if limiter is None:
            limiter = self._limiters[participant.name] = anyio.CapacityLimiter(limit)
        return limiter

    def _done(
        self, task: Task, participant: Participant, context: Context, result: object
    ) -> Finish:
        envelope, now = task.row.envelope, self.clock.now()
        outbox: list[OutboxRow] = []
        if participant.kind == "command":
            events = _events(participant, result)
            outbox += replies(envelope, events, now, self.service.name)
        elif result is not None:
            raise TypeError(
                f"subscriber {participant.name} ({participant.location}) returned {type(result).__name__}; "
                "expected None; publish with context.publish"
            )
        outbox += follow_ups(envelope, task.row.consumer, context.outgoing, context.origin, now)
        return Finish(task=task, outbox=tuple(outbox))

    def _refused(self, task: Task, reason: str) -> Finish:
        """A permanent no: told to the sender, or kept as a dead letter where nobody asked."""
        envelope, now = task.row.envelope, self.clock.now()
        rows = failure(
            envelope,
            reason,
            refused=True,
            attempts=task.row.attempts + 1,
            now=now,
            service=self.service.name,
        )
        if not rows and not task.tombstone:
            return self._dead(task, "failed", f"refused: {reason}", attempts=task.row.attempts + 1)
        log.info(
            "Command was refused",
            extra={
                "consumer": task.row.consumer,
                "message_id": envelope.id,
                "type": envelope.type,
                "reason": reason,
            },
        )
        self._notice(task, "refused")
        return Finish(task=task, outbox=tuple(rows), error=reason)

    def _failed(self, task: Task, retry: Retry, error: str, attempt: int) -> Finish:
        """Tried again later, until the attempts run out: then a failure and a dead letter."""
        envelope, now = task.row.envelope, self.clock.now()
        if attempt < retry.attempts_max:
            retry_at = retry.due_at(now, attempt, envelope.id, task.row.consumer)
            log.warning(
                "Handler failed, message is tried again",
                extra={
                    "consumer": task.row.consumer,
                    "message_id": envelope.id,
                    "type": envelope.type,
                    "attempt": attempt,
                    "in_s": (retry_at - now) / 1e6,
                    "error": error.strip().rpartition("\n")[2],
                },
            )
            self._notice(task, "retry")
            return Finish(task=task, retry_at=retry_at, error=error)
        return self._dead(task, "failed", error, attempts=attempt)

    def _dead(self, task: Task, reason: str, error: str, *, attempts: int = 0) -> Finish:
        row, now = task.row, self.clock.now()
        last = error.strip().rpartition("\n")[2]
        log.error(
            "Message became a dead letter",
            extra={
                "consumer": row.consumer,
                "message_id": row.message_id,
                "type": row.envelope.type,
                "reason": reason,
                "error": last,
            },
        )
        self._notice(task, "dead")
        letter = DeadLetterRow(
            consumer=row.consumer,
            message_id=row.message_id,
            topic=row.envelope.topic,
            message_type=row.envelope.type,
            reason=reason,
            error=error,
            attempts=attempts or row.attempts,
            entry=encode_envelope(row.envelope),
            decoded=True,
            at=now,
            lane=row.lane,
            sequence=row.sequence,
        )
        rows: list[OutboxRow] = []
        if row.consumer == self.service.name:
            rows = failure(
                row.envelope,
                f"{reason}: {last}",
                refused=False,
                attempts=attempts or row.attempts,
                now=now,
                service=self.service.name,
            )
        return Finish(task=task, outbox=tuple(rows), error=error, dead_letter=letter)

    # ------------------------------------------------------------------------------ finish together

    def _later(self, finish: Finish) -> None:
        self._finishes.append(finish)
        self._finish_wake.set()

    async def _finish_together(self) -> None:
        """Ends tasks that used no session, as many as there are, in one transaction."""
        while not (self._stopping and not self.running and not self._finishes):
            await self._finish_wake.wait()
            self._finish_wake = anyio.Event()
            pause = 0.1
            while self._finishes:
                try:
                    await self._flush()
                except StoreError as error:
                    log.warning("Finished work waits to be stored", extra={"error": str(error)})
                    await anyio.sleep(pause)
                    pause = min(2 * pause, 10.0)

    async def _flush(self) -> None:
        finishes, self._finishes = self._finishes, []
        if not finishes:
            return
        try:
            pending = await self._stored(finishes)
        except BaseException:
            # Perhaps they are stored; then they are skipped the next time.
            self._finishes = finishes + self._finishes
            raise
        self._wake.set()  # the next command of each lane is free only now
        await self.publish(pending)

    async def _stored(self, finishes: list[Finish]) -> list[PendingRow]:
        """Stores how tasks ended; halves them until what the database refuses stands alone."""
        try:
            return await self.store.finish(finishes)
        except DataRefused as error:
            if len(finishes) > 1:
                middle = len(finishes) // 2
                first = await self._stored(finishes[:middle])
                return first + await self._stored(finishes[middle:])
            [finish] = finishes
            if finish.dead_letter is not None:
                log.error(  # noqa: TRY400 - the database's words say it all
                    "Dead letter cannot be stored, the message is tried again",
                    extra={
                        "consumer": finish.task.row.consumer,
                        "message_id": finish.task.row.message_id,
                        "error": str(error),
                    },
                )
                return []
            # Its reply cannot be stored; the failure can.
            return await self.store.finish([self._dead(finish.task, "failed", _traceback(error))])

    async def _renew(self, scope: anyio.CancelScope) -> None:
        with scope:
            while True:
                await anyio.sleep(self.lease_us / 3e6)
                # What is done and not stored yet is still ours.
                tasks = [*self.running.values(), *(finish.task for finish in self._finishes)]
                if not tasks:
                    continue
                try:
                    await self.store.renew(tasks, self.lease_us)
                except StoreError as error:
                    log.warning(
                        "Leases could not be renewed",
                        extra={"tasks": len(tasks), "error": str(error)},
                    )

    def _notice(self, task: Task, outcome: str) -> None:
        if self.observer is not None:
            self.observer.notice(
                "task.finished",
                {"consumer": task.row.consumer, "type": task.row.envelope.type, "outcome": outcome},
            )


class _Opened:
    """Hands out the session, and knows whether anybody asked for it."""

    def __init__(self, work: Work) -> None:
        self.work, self.used = work, False

    def __call__(self) -> Any:
        session = self.work.session
        self.used = True
        return session


def _key(task: Task) -> tuple[str, str]:
    return task.row.consumer, task.row.message_id


def _ending() -> bool:
    """True while whoever runs the handlers is being cancelled."""
    return anyio.current_effective_deadline() == -math.inf


async def _limited(participant: Participant, arguments: Sequence[Any]) -> object:
    if participant.timeout is None:
        return await participant.function(*arguments)
    with anyio.fail_after(participant.timeout.total_seconds()):
        return await participant.function(*arguments)


def _events(participant: Participant, result: object) -> list[Event]:
    """A command handler's return value as the events it replies with."""
    if result is None:
        return []
    events = [result] if isinstance(result, Event) else list(_iterable(result))
    wrong = next((one for one in events if not isinstance(one, Event)), None)
    if wrong is not None or (not events and isinstance(result, str | bytes)):
        raise TypeError(
            f"handler {participant.name} ({participant.location}) returned {type(wrong or result).__name__}; expected "
            "an event, several events, or None"
        )
    replies_ = cast("list[Event]", events)
    for event in replies_:
        encode_message(event)
    return replies_


def _iterable(value: object) -> Iterable[object]:
    if isinstance(value, Iterable):
        return cast("Iterable[object]", value)
    return [value]


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-20_000:]


__all__ = ["Participants", "Publish"]
