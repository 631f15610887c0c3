"""Participants beside a store that is slow, refuses, or is not there, and handlers of every kind."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from sagacity import Command, Context, Service, handles
from sagacity.backends.memory import MemoryStore
from sagacity.core.errors import Conflict, DataRefused, Unavailable
from sagacity.core.plan import InboxRow, Outcome, Plan
from sagacity.core.routing import Retry
from sagacity.ports import Finish, PendingRow, Task
from sagacity.worker.participants import Participants
from tests.waiting import async_eventually
from tests.worker.running import envelope

pytestmark = pytest.mark.asyncio


class Do(Command, topic="work"):
    ref: str


class Handler:
    """Counts its attempts, and behaves as it is told for each of them."""

    def __init__(self, behave: Callable[[str, int], Awaitable[None]]) -> None:
        self.behave = behave
        self.attempts: list[tuple[str, int]] = []
        self.done: list[str] = []

    @handles(Do)
    async def do(self, command: Do, context: Context) -> None:
        self.attempts.append((command.ref, context.attempt))
        await self.behave(command.ref, context.attempt)
        self.done.append(command.ref)


async def _well(ref: str, attempt: int) -> None:
    del ref, attempt


class Faulty(MemoryStore):
    """A memory store that raises what it is given before it does what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, list[Exception]] = {}
        self.refused: set[str] = set()
        """Ids of messages whose end is refused, unless it is a dead letter."""
        self.before_finish: Callable[[], Awaitable[None]] | None = None

    def _fault(self, what: str) -> None:
        if self.faults.get(what):
            raise self.faults[what].pop(0)

    async def claim(self, consumers: Mapping[str, int], lease_us: int, gap_us: int) -> list[Task]:
        self._fault("claim")
        return await super().claim(consumers, lease_us, gap_us)

    async def renew(self, renewed: Sequence[Task], lease_us: int) -> list[Task]:
        self._fault("renew")
        return await super().renew(renewed, lease_us)

    async def finish(self, finishes: Sequence[Finish]) -> list[PendingRow]:
        if self.before_finish is not None:
            await self.before_finish()
        self._fault("finish")
        for finish in finishes:
            if finish.task.row.message_id in self.refused and finish.dead_letter is None:
                raise DataRefused("finish: the database refuses a value")
        return await super().finish(finishes)


@asynccontextmanager
async def running(
    store: MemoryStore, handler: Handler, *, lease_us: int = 30_000_000, attempts_max: int = 3
) -> AsyncGenerator[Participants]:
    service = Service("work", handlers=[handler.do])

    async def publish(pending: Sequence[PendingRow]) -> None:
        del pending

    participants = Participants(
        service,
        store,
        store.clock,
        publish,
        retry=Retry(attempts_max=attempts_max, base_us=20_000, cap_us=50_000),
        lease_us=lease_us,
    )
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(participants.run, 20_000)
            yield participants
            participants.stop()


async def park(store: MemoryStore, *refs: str) -> None:
    service = Service("work", handlers=[Handler(_well).do])
    async with store.transaction() as transaction:
        plan = Plan(now=transaction.now)
        for ref in refs:
            rows = service.work_rows(envelope(Do(ref), ref), transaction.now)
            plan.parked += rows
            plan.inbox += [InboxRow(row.consumer, row.message_id, Outcome.PARKED) for row in rows]
        await transaction.write(plan)


async def empty(store: MemoryStore) -> None:
    async def holds() -> bool:
        return not (await store.counts())["parked"]

    await async_eventually(holds, "all work is done")


async def until(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await async_eventually(holds, "the test goes on")


@pytest.mark.parametrize("raised", [asyncio.CancelledError, SystemExit])
async def test_what_ends_a_task_elsewhere_is_a_failed_attempt_here(
    raised: type[BaseException],
) -> None:
    """A handler that lets a cancellation of its own out, or calls exit, ends no other handler."""

    async def behave(ref: str, attempt: int) -> None:
        if ref == "bad" and attempt == 1:
            raise raised()

    handler, store = Handler(behave), MemoryStore()
    await park(store, "bad", "good")
    async with running(store, handler):
        await empty(store)
        await park(store, "later")
        await empty(store)
    assert Counter(handler.done) == Counter(["bad", "good", "later"])
    assert ("bad", 2) in handler.attempts
    assert await store.dead_letters() == []


async def test_a_handler_whose_own_task_was_cancelled() -> None:
    """The same, as it really comes about."""

    async def behave(ref: str, attempt: int) -> None:
        if attempt == 1:
            inner = asyncio.create_task(asyncio.sleep(60))
            inner.cancel()
            await inner

    handler, store = Handler(behave), MemoryStore()
    await park(store, "c1")
    async with running(store, handler):
        await empty(store)
    assert handler.attempts == [("c1", 1), ("c1", 2)]
    assert handler.done == ["c1"]


async def test_told_to_end_at_once_is_no_attempt_and_frees_the_lease() -> None:
    """A handler that hangs at the end of the shutdown time is handed out anew at once, uncounted."""
    hangs = anyio.Event()

    async def behave(ref: str, attempt: int) -> None:
        hangs.set()
        await anyio.sleep_forever()

    handler, store = Handler(behave), MemoryStore()
    await park(store, "c1")
    with anyio.fail_after(10), anyio.CancelScope() as scope:
        async with running(store, handler):
            await hangs.wait()
            scope.cancel()
    [task] = await store.claim({"work": 1}, 1_000_000, 0)
    assert task.row.attempts == 0


async def test_what_was_done_is_stored_though_told_to_end_at_once() -> None:
    """The end of a task that waits to be stored is not thrown away with the process."""
    store = Faulty()
    store.faults["finish"] = [Unavailable("away")]
    handler = Handler(_well)
    await park(store, "c1")
    with anyio.fail_after(10), anyio.CancelScope() as scope:
        async with running(store, handler):
            await until(lambda: not store.faults["finish"])
            scope.cancel()
    assert handler.done == ["c1"]
    assert (await store.counts())["parked"] == 0


@pytest.mark.parametrize("what", ["claim", "renew", "finish"])
async def test_a_lost_race_in_the_store_ends_nothing(what: str) -> None:
    """A deadlock or a lock that was not free in time: the same is asked again."""

    async def behave(ref: str, attempt: int) -> None:
        await until(lambda: not store.faults["renew"])

    store = Faulty()
    store.faults = {"claim": [], "renew": [], "finish": []}
    store.faults[what] = [Conflict("deadlock"), Conflict("deadlock")]
    handler = Handler(behave)
    await park(store, "c1")
    async with running(store, handler, lease_us=300_000):
        await empty(store)
    assert handler.attempts == [("c1", 1)]


async def test_ends_that_come_while_a_refused_one_is_looked_for_are_kept() -> None:
    """One of the ends is refused; none of the others, earlier or later, is forgotten for it."""
    store = Faulty()
    store.refused = {"bad"}
    gate = anyio.Event()
    late = anyio.Event()

    async def behave(ref: str, attempt: int) -> None:
        if ref.startswith("late"):
            await late.wait()
        else:
            await gate.wait()

    async def finishing() -> None:
        late.set()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()

    store.before_finish = finishing
    handler = Handler(behave)
    refs = ["good1", "bad", "good2", "late1", "late2", "late3"]
    await park(store, *refs)
    async with running(store, handler):
        await until(lambda: len(handler.attempts) == len(refs))
        gate.set()
        await empty(store)
    assert Counter(handler.done) == Counter(refs)
    assert [letter.row.message_id for letter in await store.dead_letters()] == ["bad"]


async def test_a_lease_that_ran_out_under_its_own_handler_starts_no_second_one() -> None:
    """The loop was held up for longer than the lease: the one at work goes on, and ends the task."""
    store = Faulty()
    store.faults["renew"] = [Unavailable("away")] * 8
    enough = anyio.Event()
    ran: list[int] = []

    async def behave(ref: str, attempt: int) -> None:
        ran.append(attempt)
        await enough.wait()

    handler = Handler(behave)
    await park(store, "c1")
    async with running(store, handler, lease_us=100_000):
        await until(lambda: not store.faults["renew"])
        enough.set()
        await empty(store)
    assert ran == [1]
    assert handler.done == ["c1"]
    assert await store.dead_letters() == []


async def test_work_that_waits_to_be_stored_is_not_done_again() -> None:
    """Its lease is kept, and where it could not be kept, the next one is taken for the same work."""
    store = Faulty()
    store.faults["renew"] = [Unavailable("away")] * 4
    store.faults["finish"] = [Unavailable("away")] * 3
    handler = Handler(_well)
    await park(store, "c1")
    async with running(store, handler, lease_us=100_000):
        await empty(store)
    assert store.faults["finish"] == []
    assert handler.attempts == [("c1", 1)]
