"""Two batches at a time: what one may not do to the other, to a stop, and to what has left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import redis.asyncio

from sagacity import Event, Saga, Service, State, on
from sagacity.backends.memory import MemoryBus, MemoryStore, MemoryTransaction
from sagacity.backends.memory.bus import MemorySubscription
from sagacity.backends.redis import RedisBus
from sagacity.codec import from_fields
from sagacity.core.delivery import Delivery, Envelope, derived_id
from sagacity.core.errors import BusUnavailable, DataRefused, Unavailable
from sagacity.core.plan import Plan
from sagacity.ports import PendingRow
from sagacity.worker.config import Settings
from sagacity.worker.cycle import Cycle
from sagacity.worker.intake import ALONE_FROM, Intake
from sagacity.worker.recovery import Recovery
from sagacity.worker.relay import Relay
from sagacity.worker.sorting import Sorted, behind, sorted_input
from sagacity.worker.worker import Worker
from tests.waiting import async_eventually
from tests.worker.lanes import Begin, Tick, out_of_order
from tests.worker.lanes import service as lanes
from tests.worker.running import QUICK, envelope, site

pytestmark = pytest.mark.asyncio

decoded: list[str] = []


class Opened(Event, topic="overlap"):
    ref: str

    def __post_init__(self) -> None:
        decoded.append(self.ref)


class Told(Event, topic="told"):
    ref: str


class Closed(Event, topic="overlap"):
    ref: str


class Case(Saga, key="ref"):
    opened = State()
    closed = State(final=True)

    ref: str
    times: int = 0

    @on(Opened, starts=True, goto=opened)
    def begin(self, event: Opened) -> None:
        self.again(event)

    @on(Opened, when=opened)
    def again(self, event: Opened) -> None:
        self.times += 1
        self.publish(Told(event.ref))

    @on(Closed, when=opened, goto=closed)
    def end(self, event: Closed) -> None: ...


service = Service("overlap", sagas=[Case])
catalog = service.catalog()


class Store(MemoryStore):
    """A store whose batches can be held at their begin, or find it away."""

    def __init__(self) -> None:
        super().__init__()
        self.open = anyio.Event()
        self.open.set()
        self.away = False
        self.waiting = self.begun = 0

    @asynccontextmanager
    async def transaction(self, *, optimistic: bool = False) -> AsyncGenerator[MemoryTransaction]:
        self.begun += 1
        self.waiting += 1
        await self.open.wait()
        self.waiting -= 1
        if self.away:
            raise Unavailable("the store is away")
        async with super().transaction(optimistic=optimistic) as transaction:
            yield transaction

    def close_gate(self) -> None:
        self.open = anyio.Event()


def worker_on(store: MemoryStore, bus: MemoryBus, **settings: Any) -> Worker:
    changed: dict[str, Any] = {**QUICK, "read_block_ms": 20, "pending_age_ms": 60_000, **settings}
    return Worker(
        service, store, bus, Settings(store="memory:", bus="memory:", **changed), consumer="w"
    )


@asynccontextmanager
async def running(worker: Worker) -> AsyncGenerator[Worker]:
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            try:
                yield worker
            finally:
                worker.stop()


async def until(holds: Any, what: str) -> None:
    async def condition() -> bool:
        return bool(holds())

    await async_eventually(condition, what)


async def handed_out(bus: MemoryBus, times: int) -> None:
    """Everything on the bus is handed out so often, and nobody acknowledges it."""
    for number in range(times):
        lost = await bus.join("overlap", f"gone{number}", service.topics)
        assert await (lost.read(100, 0) if number == 0 else lost.reclaim(0, 100))


def delivered(ref: str, number: int, *, attempt: int = 1, tries: int = 0) -> Sorted:
    one = Delivery(
        topic="overlap",
        entry_id=str(number),
        envelope=envelope(Opened(ref), f"m{number}"),
        attempt=attempt,
    )
    found = sorted_input(service, catalog, one)
    found.tries = tries
    return found


def taken(intake: Intake, limit: int = 10) -> list[str]:
    batch = intake.take(limit)
    return [] if batch is None else [one.message_id for one in batch.inputs]


# --- entries that may be what ends the process ------------------------------------------------------


async def test_a_suspect_is_decoded_after_its_try_is_noted() -> None:
    """A message whose decoding ends the process would else end each one, and never be given up."""
    store, bus = MemoryStore(), MemoryBus()
    await bus.publish([envelope(Opened("suspect"), "s")])
    await handed_out(bus, ALONE_FROM - 1)
    noted: list[bool] = []
    note = ("overlap?1", derived_id("overlap", "overlap", "1"))

    class Watching(list[str]):
        def append(self, ref: str) -> None:
            noted.append(note in store.tables.inbox)

    global decoded
    kept, decoded = decoded, Watching()
    try:
        async with running(worker_on(store, bus)):
            await until(lambda: store.tables.sagas, "it is handled")
    finally:
        decoded = kept
    assert noted
    assert all(noted), "it was decoded before anybody knew of the try"


async def test_nothing_else_is_read_while_a_suspect_is_tried() -> None:
    """Were it what came later that ends the process, the suspect would be blamed."""
    store, bus = Store(), MemoryBus()
    await bus.publish([envelope(Opened("suspect"), "s")])
    await handed_out(bus, ALONE_FROM - 1)
    async with running(worker_on(store, bus)):
        store.close_gate()
        await until(lambda: store.waiting, "the suspect is tried")
        await bus.publish([envelope(Opened("later"))])
        decoded.clear()
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert "later" not in decoded
        store.open.set()
        await until(lambda: len(store.tables.sagas) == 2, "both are handled")


async def test_a_suspect_that_another_worker_holds_lets_others_go() -> None:
    intake = Intake()
    intake.add([delivered("a", 0, attempt=ALONE_FROM)])
    first = intake.take(10)
    assert first is not None
    assert intake.alone
    first.inputs[0].tries += 1
    intake.add([delivered("b", 1), delivered("a", 2), delivered("c", 3)])
    intake.done(first, first.inputs)
    others = intake.take(10)
    assert others is not None
    assert [one.message_id for one in others.inputs] == ["m1", "m3"], "its own followers wait"
    intake.add([delivered("d", 4)])
    assert intake.take(10) is None, "and now it is its turn"
    intake.done(others)
    again = intake.take(10)
    assert again is not None
    assert [one.message_id for one in again.inputs] == ["m0"]
    intake.done(again)
    assert taken(intake) == ["m2", "m4"]


async def test_a_held_suspect_without_company_is_tried_at_once() -> None:
    intake = Intake()
    intake.add([delivered("a", 0, attempt=ALONE_FROM)])
    for _ in range(3):
        batch = intake.take(10)
        assert batch is not None
        batch.inputs[0].tries += 1
        intake.done(batch, batch.inputs)


# --- what another worker holds -----------------------------------------------------------------------


async def test_nothing_passes_what_is_held() -> None:
    """What touches a held instance waits with it, and so does what waits behind that."""
    held = [delivered("a", 0)]
    others = [delivered("b", 1), delivered("a", 2), delivered("c", 3)]
    assert behind(held, others) == ([others[1]], [others[0], others[2]])
    assert behind([], others) == ([], others)


async def test_halves_keep_the_order_and_send_each_row_once() -> None:
    """The second half finds the rows of the first one pending in the lanes that both write to."""

    class Refusing(MemoryTransaction):
        async def write(self, plan: Plan, published: Sequence[int] = ()) -> list[PendingRow]:
            if len(plan.inbox) > 1:
                raise DataRefused("too much")
            return await super().write(plan, published)

    store, bus = MemoryStore(), MemoryBus()

    class Halving(MemoryStore):
        @asynccontextmanager
        async def transaction(
            self, *, optimistic: bool = False
        ) -> AsyncGenerator[MemoryTransaction]:
            async with store.transaction(optimistic=optimistic) as transaction:
                transaction.__class__ = Refusing
                yield transaction

    cycle = Cycle(service, catalog, Halving(), bus)
    settled = await cycle.settle([delivered("a", n) for n in range(3)])
    seqs = [row.seq for row in settled.pending]
    assert seqs == sorted(set(seqs))
    assert len(seqs) == 3


async def test_a_stop_does_not_wait_for_an_instance_of_another_worker() -> None:
    store, bus = MemoryStore(), MemoryBus()
    await bus.publish([envelope(Opened("a"))])
    async with running(worker_on(store, bus)):
        await until(lambda: store.tables.sagas, "there is an instance")
    async with store.transaction() as transaction:
        assert (await transaction.load({"Case": {"a"}})).instances
        worker = worker_on(store, bus)
        with anyio.fail_after(5):
            async with running(worker):
                await bus.publish([envelope(Opened("a"), "held"), envelope(Opened("b"), "free")])
                await until(lambda: int(str(worker.report().get("busy", 0))) > 2, "it is held")
    assert len(store.tables.sagas) == 2
    async with running(worker_on(store, bus, reclaim_idle_ms=300)):
        await until(lambda: ("Case", "held") in store.tables.inbox, "another one handles it")
    assert await acknowledged(bus)


async def acknowledged(bus: MemoryBus) -> bool:
    """True where nothing is pending for the group."""
    late = await bus.join("overlap", "late", service.topics)
    return not await late.reclaim(0, 100)


# --- a store that is away, a bus that is away ---------------------------------------------------------


async def test_a_stop_asks_a_store_that_is_away_once_for_each_batch_under_way() -> None:
    """What waits behind them would only find out the same, one time-out after the other."""
    store, bus = Store(), MemoryBus()
    worker = worker_on(store, bus, batch_max=2)
    store.close_gate()
    async with running(worker):
        await bus.publish([envelope(Opened(f"o{n}")) for n in range(6)])
        await until(lambda: store.waiting == 2, "two batches are under way, one waits")
        await until(lambda: len(bus_pending(bus)) == 6, "all six were read")
        store.away = True
        worker.stop()
        store.open.set()
    assert store.begun == 2
    assert len(bus_pending(bus)) == 6
    store.away = False
    async with running(worker_on(store, bus)):
        await until(lambda: len(store.tables.sagas) == 6, "another worker finds all")
    assert await acknowledged(bus)


def bus_pending(bus: MemoryBus) -> Collection[int]:
    return bus._topics.state.topics["overlap"].groups["overlap"].pending


async def test_what_waits_for_the_store_is_not_handed_out_again_and_again() -> None:
    """Else messages become suspects, one transaction each, only because the store was away."""
    store, bus = Store(), MemoryBus()
    worker = worker_on(store, bus, reclaim_idle_ms=300, reclaim_interval_ms=10)
    async with running(worker):
        store.away = True
        await bus.publish([envelope(Opened("a"))])
        await until(lambda: store.begun > 4, "it was tried several times")
        attempts = [one.attempt for one in bus_pending_of(bus)]
        store.away = False
        await until(lambda: store.tables.sagas, "it is handled")
    assert attempts == [1]


def bus_pending_of(bus: MemoryBus) -> list[Any]:
    return list(bus._topics.state.topics["overlap"].groups["overlap"].pending.values())


async def test_what_waits_goes_on_while_the_bus_cannot_be_read() -> None:
    store = Store()
    reads: list[bool] = []

    class Unread(MemorySubscription):
        away = False

        async def read(self, limit: int, wait_ms: int) -> list[Delivery]:
            if self.away:
                reads.append(True)
                raise BusUnavailable("the bus is away")
            return await super().read(limit, wait_ms)

    class Bus(MemoryBus):
        async def join(
            self, group: str, consumer: str, topics: Collection[str]
        ) -> MemorySubscription:
            subscription = await super().join(group, consumer, topics)
            subscription.__class__ = Unread
            return subscription

    bus = Bus()
    worker = worker_on(store, bus)
    store.close_gate()
    async with running(worker):
        await bus.publish([envelope(Opened("a"), "m1")])
        await until(lambda: store.waiting == 1, "the first batch is under way")
        await bus.publish([envelope(Opened("a"), "m2")])
        await until(lambda: len(bus_pending(bus)) == 2, "its follower waits")
        Unread.away = True
        await until(lambda: reads, "the bus is away")
        reads.clear()
        store.open.set()
        await until(lambda: ("Case", "m2") in store.tables.inbox, "the follower is handled")
        assert not reads, "it waited until the bus was asked again"
        Unread.away = False


async def test_the_end_of_a_batch_wakes_a_read_that_waits_long(redis_url: str) -> None:
    """What waits for an instance goes at once, not when the next entry comes."""
    store, bus = Store(), RedisBus(redis_url)
    changed: dict[str, Any] = {**QUICK, "read_block_ms": 5000}
    settings = Settings(store="memory:", bus=redis_url, **changed)
    worker = Worker(service, store, bus, settings, consumer="w")
    async with running(worker):
        await until(lambda: worker.ready, "it joins")
        for turn in range(8):
            store.close_gate()
            await bus.publish([envelope(Opened("a"), f"first{turn}")])
            await until(lambda: store.waiting == 1, "a batch is under way")
            decoded.clear()
            await bus.publish([envelope(Opened("a"), f"second{turn}")])
            await until(lambda: "a" in decoded, "its follower waits")
            began = time.monotonic()
            store.open.set()
            await until(lambda n=turn: ("Case", f"second{n}") in store.tables.inbox, "it goes")
            assert time.monotonic() - began < 4, "nobody woke the read"
    await bus.close()


@pytest.mark.parametrize(
    "settings",
    [{"batch_max": 1}, {"batches_max": 1}, {"in_flight_bytes_max": 262_144}],
    ids=["batches of one", "one batch", "few bytes"],
)
async def test_narrow_limits_bound_what_is_held_and_stop_nothing(settings: dict[str, int]) -> None:
    store, bus = Store(), MemoryBus()
    worker = worker_on(store, bus, **settings)
    bodies = [envelope(Opened(f"o{n % 7}" + "." * 200_000), f"m{n}") for n in range(30)]
    most = 0
    async with running(worker):
        await bus.publish(bodies[:1])
        await until(lambda: store.tables.inbox, "it knows how large they are")
        store.close_gate()
        await bus.publish(bodies[1:])
        await until(lambda: store.waiting, "a batch is under way")
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        most = len(bus_pending(bus))
        store.open.set()
        await until(lambda: len(store.tables.inbox) == len(bodies), "all are handled")
    batches = settings.get("batches_max", 2)
    limit = settings.get("batch_max", 300)
    bound = 1 if "in_flight_bytes_max" in settings else (batches + 1) * limit
    assert 0 < most <= bound
    assert await acknowledged(bus)


# --- what has left -----------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 5, 10, 20, 40, 80, 160])
async def test_a_stop_forgets_what_its_last_batches_published(turns: int) -> None:
    """Else each stop makes another worker's relay send copies."""
    store, bus = MemoryStore(), MemoryBus()
    worker = worker_on(store, bus, batch_max=3)
    await bus.publish([envelope(Opened(f"o{n % 5}"), f"m{n}") for n in range(40)])
    async with running(worker):
        await until(lambda: worker.ready, "it joins")
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
    assert (await store.counts())["outbox.pending"] == 0
    async with running(worker_on(store, bus)):
        await until(lambda: len(bus.messages("told")) >= 40, "all is told")
    assert set(Counter(one.id for one in bus.messages("told")).values()) == {1}
    assert await acknowledged(bus)


async def test_what_the_bus_lost_before_it_was_forgotten_stays_pending() -> None:
    """The row was pending all the time, so nothing makes it pending again: who forgets it loses it."""
    store, bus = MemoryStore(), MemoryBus()
    cycle = Cycle(service, catalog, store, bus)
    first = await cycle.settle([delivered("a", 0)])
    assert await cycle.publish(first.pending)
    bus.wipe()
    cycle.lost()
    second = await cycle.settle([delivered("a", 1)])
    assert [row.seq for row in second.pending] == [1, 2], "the lost one goes first, in order"
    await cycle.forget_published()
    assert (await store.counts())["outbox.pending"] == 2
    assert await cycle.publish(second.pending)
    await cycle.settle([delivered("b", 2)])
    assert (await store.counts())["outbox.pending"] == 1


async def test_a_batch_under_way_does_not_forget_what_the_bus_lost_meanwhile() -> None:
    store, bus = Store(), MemoryBus()
    cycle = Cycle(service, catalog, store, bus)
    first = await cycle.settle([delivered("a", 0)])
    assert await cycle.publish(first.pending)
    store.close_gate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cycle.settle, [delivered("b", 1)])
        await until(lambda: store.waiting, "the next batch has taken what to forget")
        assert cycle.published == []
        cycle.lost()
        store.open.set()
    assert [row.seq for row in await store.pending(store.clock.now(), 10)] == [1, 2]
    assert cycle.published == []


async def test_a_loss_is_known_before_rows_are_pending_again_and_to_every_worker() -> None:
    """Two processes, each with something that left and is not forgotten; the first one repairs."""
    store, bus = MemoryStore(), MemoryBus()
    cycles = [Cycle(service, catalog, store, bus) for _ in range(2)]
    recoveries = [
        Recovery(store, bus, store.clock, lambda: ["told"], suspected=cycle.lost)
        for cycle in cycles
    ]
    for number, (cycle, recovery) in enumerate(zip(cycles, recoveries, strict=True)):
        await recovery.check()
        settled = await cycle.settle([delivered(f"o{number}", number)])
        assert await cycle.publish(settled.pending)
    bus.wipe()
    for cycle, recovery in zip(cycles, recoveries, strict=True):
        await recovery.check()
        await cycle.forget_published()
    assert await Relay(store, bus, store.clock).sweep(age_us=0) == 2
    assert len(bus.messages("told")) == 2
    for cycle, recovery in zip(cycles, recoveries, strict=True):
        settled = await cycle.settle([delivered("new", 9)])
        assert await cycle.publish(settled.pending)
        await recovery.check()
        assert len(cycle.published) == len(settled.pending), "nothing was lost since"


async def test_a_loss_is_repaired_once_though_a_row_was_pending_all_the_time() -> None:
    """Then no two marks count different numbers of rows, and the lost one must go all the same."""
    store, bus = MemoryStore(), MemoryBus()
    cycle = Cycle(service, catalog, store, bus)
    recovery = Recovery(store, bus, store.clock, lambda: ["told"], mark_every_us=1)
    stuck = await cycle.settle([delivered("stuck", 0)])
    assert len(stuck.pending) == 1
    await recovery.check()
    snapshot = b""
    for number in (1, 2):
        settled = await cycle.settle([delivered("a", number)])
        assert await cycle.publish(settled.pending)
        await cycle.forget_published()
        await recovery.check()
        snapshot = snapshot or bus.snapshot()
    assert len({(one.entry_id, one.max_seq) for one in await store.marks("told")}) == 2
    bus.fail_over(snapshot)
    assert await recovery.check() > 0
    await Relay(store, bus, store.clock).sweep(age_us=0)
    assert [await recovery.check() for _ in range(3)] == [0, 0, 0]
    for lost in (snapshot, b""):
        if lost:
            bus.fail_over(lost)
        else:
            bus.wipe()
        assert await recovery.check() > 0
        await Relay(store, bus, store.clock).sweep(age_us=0)
        assert [await recovery.check() for _ in range(3)] == [0, 0, 0]


async def test_what_a_failed_batch_was_to_forget_is_forgotten_by_the_next() -> None:
    """A lost race in the middle of one batch; the other one leaves alone what has left."""
    store, bus = Store(), MemoryBus()
    cycle = Cycle(service, catalog, store, bus)
    first = await cycle.settle([delivered("a", 0)])
    assert await cycle.publish(first.pending)
    store.away = True
    with pytest.raises(Unavailable):
        await cycle.settle([delivered("b", 1)])
    assert cycle.published == [1]
    store.away = False
    second = await cycle.settle([delivered("a", 2)])
    assert [row.seq for row in second.pending] == [2]
    assert [row.seq for row in await store.pending(store.clock.now(), 10)] == [2]


# --- figures -----------------------------------------------------------------------------------------


async def test_a_batch_that_stands_still_shows_though_the_loop_goes_on_reading() -> None:
    store, bus = Store(), MemoryBus()
    worker = worker_on(store, bus)
    async with running(worker):
        store.close_gate()
        await bus.publish([envelope(Opened("a"))])
        await until(lambda: store.waiting, "a batch is under way")
        await until(
            lambda: float(str(worker.report()["idle_s"])) > 0.2, "it is said to stand still"
        )
        store.open.set()
        await until(lambda: float(str(worker.report()["idle_s"])) < 0.1, "it moves again")


# --- all of it ---------------------------------------------------------------------------------------


class Overlaps:
    """Counts batches, and what they found."""

    def __init__(self) -> None:
        self.batches = 0

    def notice(self, name: str, attributes: Mapping[str, object]) -> None:
        self.batches += name == "batch.committed"


@pytest.mark.parametrize("batches_max", [1, 2, 4])
async def test_each_command_leaves_once_and_in_order(
    store_url: str, redis_url: str, batches_max: int
) -> None:
    """Without faults there is one entry for each message, however many batches overlap."""
    instances, ticks = 23, 12
    async with site(store_url, redis_url) as place:
        async with place.worker(
            lanes, batch_max=17, batches_max=batches_max, pending_age_ms=60_000
        ):
            events: list[Event] = [Begin(f"l{n}") for n in range(instances)]
            events += [Tick(f"l{n}") for _ in range(ticks) for n in range(instances)]
            await place.publish(*events)

            async def all_sent() -> bool:
                return await client.xlen("sagacity:steps") >= 2 * ticks * instances

            client = redis.asyncio.Redis.from_url(redis_url)
            await async_eventually(all_sent, "all was sent", 60)
        pending = await client.xpending("sagacity:ticks", "lanes")
        entries: Any = await client.xrange("sagacity:steps")
        await client.aclose()
        assert (await place.store.counts())["outbox.pending"] == 0
    assert pending["pending"] == 0
    published: list[Envelope] = [from_fields("steps", fields) for _, fields in entries]
    assert len(published) == len({one.id for one in published}) == 2 * ticks * instances
    assert out_of_order(published) == []
    lane = [n for n, one in enumerate(published) if one.saga_key == "l3"]
    published[lane[5]], published[lane[6]] = published[lane[6]], published[lane[5]]
    assert out_of_order(published) == ["l3"], "the checker sees an inversion"
