"""Whatever the bus loses is published again, and only copies of what it kept come with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise

import anyio
import pytest
import redis

from sagacity.backends.memory import MemoryBus, MemoryStore
from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.core.delivery import Envelope
from sagacity.core.errors import BusUnavailable, Unavailable
from sagacity.core.plan import OutboxRow
from sagacity.ports import Mark, PendingRow
from sagacity.testing.clock import VirtualClock
from sagacity.worker.recovery import HOUR_US, MINUTE_US, Recovery, thinned
from sagacity.worker.relay import Relay

TOPICS = ("orders", "users")


class Scene:
    """A store, a bus, a worker that publishes, and the loss check, in virtual time."""

    def __init__(self, bus: MemoryBus | RedisBus, store: MemoryStore, clock: VirtualClock) -> None:
        self.bus, self.store, self.clock = bus, store, clock
        self.noticed: list[tuple[str, Mapping[str, object]]] = []
        self.woken: list[int] = []
        self.recovery = self.worker()

    def worker(self) -> Recovery:
        return Recovery(
            self.store,
            self.bus,
            self.clock,
            lambda: TOPICS,
            republished=self.woken.append,
            observer=self,
        )

    def notice(self, name: str, attributes: Mapping[str, object]) -> None:
        self.noticed.append((name, attributes))

    async def send(self, *ids: str, topic: str = "orders", lane: str = "lane") -> None:
        """Commits messages and publishes them, as a worker does."""
        rows = await self.store.append(
            [OutboxRow(lane, Envelope(id=id_, type="t", topic=topic)) for id_ in ids]
        )
        await self.publish(rows)

    async def publish(self, rows: Sequence[PendingRow]) -> None:
        await self.bus.publish([row.envelope for row in rows])
        await self.store.published([row.seq for row in rows])

    async def pending(self) -> list[str]:
        return [row.envelope.id for row in await self.store.pending(2**62, 10_000)]

    async def later(self, seconds: float) -> int:
        """Another check; the first one after a restart may find a broken connection."""
        self.clock.advance(seconds)
        with anyio.fail_after(20):
            while True:
                try:
                    return await self.recovery.check()
                except BusUnavailable:
                    await anyio.sleep(0.01)


@pytest.fixture
def scene() -> Scene:
    clock = VirtualClock()
    return Scene(MemoryBus(clock), MemoryStore(clock), clock)


def memory(scene: Scene) -> MemoryBus:
    assert isinstance(scene.bus, MemoryBus)
    return scene.bus


# --- a bus that is fine --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_first_meeting_and_quiet_rounds_publish_nothing(scene: Scene) -> None:
    await scene.send("before the first check")
    assert await scene.recovery.check() == 0
    first = await scene.store.witness()
    assert (first.epoch, first.identity) == (await memory(scene).epoch("?"), "memory-0")
    for number in range(30):
        await scene.send(f"m{number}", topic=TOPICS[number % 2])
        assert await scene.later(7) == 0
    assert await scene.pending() == []
    assert (scene.noticed, scene.woken) == ([], [])
    witness = await scene.store.witness()
    assert set(witness.marks) == set(TOPICS)
    assert witness.settled == 31


@pytest.mark.asyncio
async def test_quiet_topics_are_not_marked_again(scene: Scene) -> None:
    await scene.recovery.check()
    await scene.send("m1")
    for _ in range(50):
        await scene.later(30)
    assert len(await scene.store.marks("orders")) == 1
    assert await scene.store.marks("users") == []  # nothing was ever published there


@pytest.mark.asyncio
async def test_what_is_pending_is_not_counted_as_published(scene: Scene) -> None:
    await scene.recovery.check()
    await scene.send("m1", "m2")
    await scene.store.append([OutboxRow("", Envelope(id="stuck", type="t", topic="users"))])
    await scene.send("m3")
    await scene.later(20)
    assert [mark.max_seq for mark in await scene.store.marks("orders")] == [2]


# --- a bus that forgot ---------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("published_since", [False, True])
async def test_emptied_bus_gets_everything_again_in_order(
    scene: Scene, caplog: pytest.LogCaptureFixture, published_since: bool
) -> None:
    await scene.recovery.check()
    for number in range(20):
        await scene.send(f"m{number}", topic=TOPICS[number % 2])
        await scene.later(600)
    await scene.send("elsewhere", topic="never marked")
    memory(scene).wipe()
    if published_since:
        # New entries have higher ids than the marks: comparing ids would not notice.
        await scene.send(*[f"n{number}" for number in range(40)])
    assert await scene.later(1) == (61 if published_since else 21)
    expected = [f"m{number}" for number in range(20)] + ["elsewhere"]
    assert (await scene.pending())[:21] == expected
    assert [name for name, _ in scene.noticed] == ["bus.lost"]
    assert len(scene.woken) == 1
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage() == "The bus lost messages or may have, they are published again"
    # Once is enough, also for the other workers.
    await scene.publish(await scene.store.pending(2**62, 1000))
    assert [await scene.later(11) for _ in range(5)] == [0] * 5
    assert await scene.worker().check() == 0


@pytest.mark.asyncio
async def test_failover_to_a_lagging_replica_repeats_what_it_lacks(scene: Scene) -> None:
    await scene.recovery.check()
    for number in range(10):
        await scene.send(f"kept{number}")
        await scene.later(600)
    await scene.later(600)
    replica = memory(scene).snapshot()
    for number in range(5):
        await scene.send(f"lost{number}")
        await scene.later(600)  # marked, but the replica does not have it
    await scene.send("lost5")  # not even marked
    memory(scene).fail_over(replica)
    await scene.send("new")
    assert await scene.later(1) > 0
    pending = await scene.pending()
    assert [id_ for id_ in pending if id_.startswith("lost")] == [f"lost{n}" for n in range(6)]
    assert not [id_ for id_ in pending if id_.startswith("kept")]
    await scene.publish(await scene.store.pending(2**62, 1000))
    assert [await scene.later(600) for _ in range(3)] == [0, 0, 0]


@pytest.mark.asyncio
async def test_restart_without_a_loss_repeats_the_margin_only(scene: Scene) -> None:
    await scene.recovery.check()
    await scene.send("old")
    await scene.later(3600)
    await scene.send("recent")
    await scene.later(20)
    await scene.send("last")
    memory(scene).fail_over(memory(scene).snapshot())
    await scene.later(1)
    assert await scene.pending() == ["recent", "last"]


@pytest.mark.asyncio
async def test_row_committed_late_with_a_low_number_is_in_the_margin(scene: Scene) -> None:
    """It had its number before the mark, but was committed and published after it."""
    await scene.recovery.check()
    await scene.send("slow")  # number 1, seen by nobody yet
    slow = scene.store.tables.outbox[1]
    scene.clock.advance(30)
    await scene.send("m2")
    replica = memory(scene).snapshot()
    await scene.later(1)
    assert (await scene.store.witness()).marks["orders"].max_seq == 2
    assert slow.envelope.id == "slow"
    memory(scene).fail_over(replica)
    await scene.later(5)
    assert "slow" in await scene.pending()


@pytest.mark.asyncio
async def test_lost_topic_does_not_touch_the_others(scene: Scene) -> None:
    await scene.recovery.check()
    await scene.send("o1")
    await scene.send("u1", topic="users")
    await scene.later(3600)
    bus = memory(scene)
    (entry,) = [number for number in ("1",) if await bus.holds("orders", number)]
    bus.delete("orders", entry)
    assert await scene.later(1) == 1
    assert await scene.pending() == ["o1"]
    await scene.publish(await scene.store.pending(2**62, 10))
    assert [await scene.later(11) for _ in range(3)] == [0, 0, 0]


@pytest.mark.asyncio
async def test_two_workers_repeat_once(scene: Scene) -> None:
    await scene.recovery.check()
    await scene.send("m1")
    await scene.later(20)
    memory(scene).wipe()
    counts: list[int] = []

    async def check() -> None:
        counts.append(await scene.worker().check())

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(check)
    assert sorted(counts) == [0, 0, 0, 0, 1]


@pytest.mark.asyncio
async def test_worker_that_was_down_during_the_loss_finds_out_at_start(scene: Scene) -> None:
    await scene.recovery.check()
    await scene.send("m1")
    await scene.later(20)
    memory(scene).wipe()
    assert await scene.worker().check() == 1


@pytest.mark.asyncio
async def test_failing_checks_are_said_once_and_tried_again(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    calls = 0
    witness = scene.store.witness

    async def failing() -> object:
        nonlocal calls
        calls += 1
        if calls <= 3:
            raise Unavailable("the database is away")
        if calls == 5:
            scene.recovery.stop()
        return await witness()

    monkeypatch.setattr(scene.store, "witness", failing)
    with anyio.fail_after(10):
        await scene.recovery.run(0.001)
    assert [record.getMessage() for record in caplog.records] == [
        "Loss check failed, tried again later",
        "Loss check works again",
    ]


# --- marks ---------------------------------------------------------------------------------------


def test_marks_get_sparser_with_age_and_end_with_the_retention() -> None:
    now, step = 400 * 24 * HOUR_US, 10_000_000
    marks = [
        Mark(topic="t", at=now - age, entry_id="1-1", max_seq=1)
        for age in range(0, 3 * 24 * HOUR_US, step)
    ]
    dropped = thinned(marks, now, 2 * 24 * HOUR_US)
    kept = {*marks} - {*dropped}
    ages = sorted(now - mark.at for mark in kept)
    assert ages[:12] == [number * step for number in range(12)]
    assert max(ages) < 2 * 24 * HOUR_US
    assert len(ages) < 12 + 121 + 48
    gaps = [(late - early, late) for early, late in pairwise(ages)]
    assert all(gap <= MINUTE_US for gap, age in gaps if age < 2 * HOUR_US - MINUTE_US)
    assert all(gap <= 2 * HOUR_US for gap, _ in gaps)
    assert thinned(list(kept), now, 2 * 24 * HOUR_US) == []


@pytest.mark.asyncio
async def test_marks_of_a_long_run_stay_few(scene: Scene) -> None:
    await scene.recovery.check()
    for number in range(1500):
        await scene.send(f"m{number}")
        await scene.later(60)
    assert len(await scene.store.marks("orders")) < 250


# --- on Redis ------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["flush", "kill without a file", "delete one stream"])
async def test_redis_that_lost_its_streams_gets_them_again(how: str) -> None:
    clock = VirtualClock()
    with EmbeddedRedis() as server:
        async with RedisBus(server.url) as bus:
            scene = Scene(bus, MemoryStore(clock), clock)
            await scene.recovery.check()
            await scene.send("m1", "m2")
            await scene.later(600)
            await scene.send("m3")
            assert await scene.later(600) == 0
            if how == "kill without a file":
                server.kill()
                server.restart()
            else:
                with redis.Redis.from_url(server.url) as client:
                    client.execute_command(
                        *(["FLUSHALL"] if how == "flush" else ["DEL", "sagacity:orders"])
                    )
            assert await scene.later(1) == 3
            relay = Relay(scene.store, bus, clock)
            await relay.sweep()
            subscription = await bus.join("g", "c", ["orders"])
            found = await subscription.read(10, 5000)
            assert [d.envelope.id for d in found if d.envelope] == ["m1", "m2", "m3"]
            assert [await scene.later(600) for _ in range(3)] == [0, 0, 0]


@pytest.mark.asyncio
async def test_redis_restarted_with_its_file_repeats_the_margin_only(
    private_redis: EmbeddedRedis,
) -> None:
    clock = VirtualClock()
    async with RedisBus(private_redis.url) as bus:
        scene = Scene(bus, MemoryStore(clock), clock)
        await scene.recovery.check()
        await scene.send("old")
        await scene.later(3600)
        await scene.send("recent")
        assert await scene.later(20) == 0
        private_redis.restart()
        await scene.later(1)
        assert await scene.pending() == ["recent"]
        assert await scene.later(1) == 0
