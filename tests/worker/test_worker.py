"""The worker on real servers: what it promises to messages, sagas and participants."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from functools import partial

import anyio
import pytest

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.session import session_factory
from sagacity.core.plan import OutboxRow
from sagacity.worker.relay import Relay
from tests.waiting import async_eventually
from tests.worker.running import envelope, site
from tests.worker.shop import Charge, OrderPlaced, Poke, Shop

pytestmark = pytest.mark.asyncio


def _has_done(shop: Shop, goal: int) -> bool:
    return len(shop.did) >= goal


async def test_orders_are_shipped_and_refused_ones_are_undone(
    store_url: str, redis_url: str
) -> None:
    """Twenty orders end where they should, on every kind of store."""
    shop = Shop()
    shop.refuse("ship", *(f"o{n}" for n in range(0, 20, 2)))
    async with site(store_url, redis_url) as place, place.worker(shop.service()):
        await place.publish(*(OrderPlaced(f"o{n}", n) for n in range(20)))
        await place.quiet(completed=10, compensated=10)
    assert Counter(shop.did) == Counter(
        [("charge", f"o{n}") for n in range(20)]
        + [("ship", f"o{n}") for n in range(1, 20, 2)]
        + [("refund", f"o{n}") for n in range(0, 20, 2)]
        + [(what, f"o{n}") for n in range(20) for what in ("note", "count")]
    )


@pytest.mark.requirement("R21")
async def test_ten_copies_have_one_effect(store_url: str, redis_url: str) -> None:
    """The same message ten times, in several batches: each consumer works once."""
    shop = Shop()
    async with site(store_url, redis_url) as place, place.worker(shop.service()):
        for _ in range(5):
            await place.publish(*[OrderPlaced("o1", 5)] * 2, ids=["m1", "m1"])
        await place.quiet(completed=1)
    assert Counter(shop.did) == Counter(
        [("charge", "o1"), ("ship", "o1"), ("note", "o1"), ("count", "o1")]
    )


@pytest.mark.requirement("R64")
async def test_what_a_dead_worker_held_is_finished_by_another(
    store_url: str, redis_url: str
) -> None:
    """Entries read and never acknowledged are claimed after the idle time."""
    shop = Shop()
    service = shop.service()
    async with site(store_url, redis_url) as place:
        dead = await place.bus.join("shop", "dead", service.topics)
        await place.publish(*(OrderPlaced(f"o{n}", n) for n in range(10)))
        held = await dead.read(10, 1000)
        assert len(held) == 10
        async with place.worker(service, "alive"):
            await place.quiet(completed=10)
        await dead.close()
    assert all(shop.times("ship", f"o{n}") == 1 for n in range(10))


@pytest.mark.requirement("R64")
async def test_a_worker_killed_in_the_middle_loses_nothing(store_url: str, redis_url: str) -> None:
    """Five workers are cancelled at whatever they are doing; the sixth finishes. Effects: once each."""
    shop = Shop()
    async with site(store_url, redis_url) as place:
        await place.publish(*(OrderPlaced(f"o{n}", n) for n in range(60)))
        for life in range(5):
            async with place.worker(shop.service(), f"w{life}", lease_s=1.0) as worker:
                before = len(shop.did)
                goal = min(before + 20, 180)
                await place.until(partial(_has_done, shop, goal), "some work")
                worker.kill()
        async with place.worker(shop.service(), "last", lease_s=1.0):
            await place.quiet(completed=60)
        for n in range(60):
            history = await place.store.history("Order", f"o{n}")
            assert [row.version for row in history] == list(range(1, len(history) + 1))
            assert history[-1].state_to == "done"


@pytest.mark.requirement("R7", "R48")
async def test_failing_participants_are_tried_again_with_growing_gaps(
    store_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Three failures and then success: four attempts, each planned gap longer and kept, one effect."""
    shop = Shop()
    shop.fail("charge", 3)
    async with (
        site(store_url, redis_url) as place,
        place.worker(shop.service(), backoff_base_ms=100, backoff_cap_s=10),
    ):
        await place.publish(OrderPlaced("o1", 1))
        await place.quiet(completed=1)
    tries = [entry for entry in shop.attempts if entry[0] == "charge"]
    assert [attempt for _, _, attempt, _ in tries] == [1, 2, 3, 4]
    gaps = [later[3] - earlier[3] for earlier, later in itertools.pairwise(tries)]
    planned = [vars(record)["in_s"] for record in caplog.records if "in_s" in vars(record)]
    assert len(planned) == 3
    assert planned == sorted(planned)
    assert planned[0] >= 0.05
    assert planned[2] >= 0.2
    # The store's clock may be corrected by a little in between.
    assert all(gap >= plan - 0.02 for gap, plan in zip(gaps, planned, strict=True))
    assert shop.times("charge", "o1") == 1


@pytest.mark.requirement("R25", "R26")
async def test_a_subscriber_that_never_succeeds_leaves_a_record_and_holds_up_nobody(
    store_url: str, redis_url: str
) -> None:
    """Its failure is a dead letter with handler, event and traceback; siblings and the saga go on."""
    shop = Shop()
    shop.fail("note", 1000)
    async with site(store_url, redis_url) as place, place.worker(shop.service(), attempts_max=3):
        await place.publish(OrderPlaced("o1", 1))
        await place.quiet(completed=1)
        [letter] = await place.store.dead_letters()
        assert letter.row.consumer == "shop.note"
        assert letter.row.message_type == "orders.OrderPlaced"
        assert letter.row.attempts == 3
        assert "Traceback" in letter.row.error
        assert "ConnectionError: note cannot be reached" in letter.row.error
        assert shop.times("count", "o1") == 1
        shop.before.clear()
        assert await place.store.replay([letter.id]) == 1
        await place.until(
            lambda: shop.times("note", "o1") == 1, "the replayed message is worked on"
        )
        await place.quiet()


@pytest.mark.requirement("R47")
async def test_a_stalled_subscriber_holds_up_no_other(store_url: str, redis_url: str) -> None:
    """One subscriber hangs on everything; the other one and the saga handle all the same."""
    shop = Shop()
    hanging = anyio.Event()
    stalled: list[str] = []

    async def stall(ref: str) -> None:
        stalled.append(ref)
        await hanging.wait()

    shop.before["note"] = stall
    async with site(store_url, redis_url) as place, place.worker(shop.service(), concurrency=4):
        await place.publish(*(OrderPlaced(f"o{n}", n) for n in range(40)))
        await place.until(
            lambda: sum(1 for what, _ in shop.did if what == "count") == 40, "the other one is done"
        )
        await place.until(
            lambda: sum(1 for what, _ in shop.did if what == "ship") == 40, "shipping"
        )
        assert sum(1 for what, _ in shop.did if what == "note") == 0
        assert 0 < len(stalled) < 4
        hanging.set()
        await place.quiet(completed=40)
    assert sum(1 for what, _ in shop.did if what == "note") == 40


async def test_a_poison_message_delays_only_its_own_saga(store_url: str, redis_url: str) -> None:
    """One of 300 raises: the other instances go on; its own later messages keep their order."""
    shop = Shop()
    hold = anyio.Event()

    async def wait(ref: str) -> None:
        await hold.wait()

    shop.before["charge"] = wait
    async with (
        site(store_url, redis_url) as place,
        place.worker(shop.service(subscribers=False), attempts_max=3),
    ):
        await place.publish(*(OrderPlaced(f"o{n}", n) for n in range(100)))
        pokes = [Poke(f"o{n}", boom=n == 7) for n in range(100)]
        later = [Poke("o7"), Poke("o7"), Poke("o8")]
        ids = [f"poke{n}" for n in range(100)] + ["later1", "later2", "later3"]
        await place.publish(*pokes, *later, ids=ids)

        async def poked() -> bool:
            seven = await place.store.saga("Order", "o7")
            return seven is not None and b"later2" in seven.data

        await async_eventually(poked, "the messages behind the poison one are handled")
        seven = await place.store.saga("Order", "o7")
        eight = await place.store.saga("Order", "o8")
        assert seven is not None
        assert b'"seen":["later1","later2"]' in seven.data
        assert eight is not None
        assert b'"seen":["poke8","later3"]' in eight.data
        [letter] = await place.store.dead_letters()
        assert (letter.row.message_id, letter.row.reason) == ("poke7", "failed")
        assert "poked o7 too hard" in letter.row.error
        hold.set()
        await place.quiet(completed=100)


@pytest.mark.requirement("R31")
async def test_commits_succeed_while_redis_is_away_and_the_backlog_keeps_its_order(
    sqlite_url: str, private_redis: EmbeddedRedis
) -> None:
    """Redis is killed for some seconds: nothing fails, everything arrives in order per lane."""
    shop = Shop()
    async with site(sqlite_url, private_redis.url) as place:
        async with place.worker(shop.service()):
            await place.publish(OrderPlaced("before"))
            await place.quiet(completed=1)
            private_redis.kill()
            rows = [
                OutboxRow(f"lane{n % 3}", envelope(OrderPlaced(f"o{n}", n), f"m{n:02}"))
                for n in range(30)
            ]
            for row in rows:
                await place.store.append([row])  # the publisher's own transaction
            await asyncio.to_thread(private_redis.start)
            await place.quiet(completed=31, seconds=60)
        reader = await place.bus.join("order-of-arrival", "reader", ["orders"])
        seen: list[str] = []
        while entries := await reader.read(100, 0):
            seen += [e.envelope.id for e in entries if e.envelope is not None]
            await reader.ack(entries)
        await reader.close()
    for lane in range(3):
        first = list(dict.fromkeys(i for i in seen if i[0] == "m" and int(i[1:]) % 3 == lane))
        assert first == [f"m{n:02}" for n in range(30) if n % 3 == lane]


@pytest.mark.requirement("R30", "R33")
async def test_a_crash_between_publish_and_mark_repeats_the_message_and_not_its_effect(
    store_url: str, redis_url: str
) -> None:
    """The relay dies after publishing: the stream has two entries of one id, the effect is one."""
    shop = Shop()
    async with site(store_url, redis_url) as place:
        [row] = await place.store.append([OutboxRow("", envelope(OrderPlaced("o1", 1), "m1"))])
        await place.bus.publish([row.envelope])  # and here the relay is gone
        async with place.worker(shop.service()):
            await place.quiet(completed=1)
        reader = await place.bus.join("copies", "reader", ["orders"])
        entries = await reader.read(10, 0)
        assert [e.envelope.id for e in entries if e.envelope is not None] == ["m1", "m1"]
        await reader.close()
    assert shop.times("charge", "o1") == shop.times("note", "o1") == 1


@pytest.mark.requirement("R34")
@pytest.mark.parametrize("acquisition", ["polling", "push"])
async def test_polling_and_push_hold_the_same_contract(
    store_url: str, redis_url: str, acquisition: str
) -> None:
    """Rows of several lanes, written while the relay runs, leave in order, each once."""
    async with site(store_url, redis_url) as place:
        store, bus = SqlStore(store_url), RedisBus(redis_url)
        relay = Relay(
            store, bus, store.clock, age_us=0 if acquisition == "polling" else 3_600_000_000
        )
        reader = await place.bus.join("readers", "reader", ["orders"])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run, 0.02 if acquisition == "polling" else 3600)
            for n in range(60):
                await place.store.append(
                    [OutboxRow(f"lane{n % 5}", envelope(OrderPlaced(f"o{n}"), f"m{n:02}"))]
                )
                if acquisition == "push":
                    relay.notify()
            seen: list[str] = []
            while len(seen) < 60:
                entries = await reader.read(100, 1000)
                seen += [e.envelope.id for e in entries if e.envelope is not None]
                await reader.ack(entries)
            relay.stop()
        assert sorted(seen) == [f"m{n:02}" for n in range(60)]
        for lane in range(5):
            assert [i for i in seen if int(i[1:]) % 5 == lane] == [
                f"m{n:02}" for n in range(60) if n % 5 == lane
            ]
        await reader.close()
        await store.close()
        await bus.close()


async def test_undecodable_oversized_unknown_and_mistyped_messages_are_dead_letters_with_raw_bytes(
    store_url: str, redis_url: str
) -> None:
    """Nothing that arrives is dropped: each bad entry is a dead letter that holds what came."""
    from redis.asyncio import Redis

    shop = Shop()
    client = Redis.from_url(redis_url)
    async with site(store_url, redis_url) as place, place.worker(shop.service()):
        await client.xadd("sagacity:orders", {b"nonsense": b"\xff\x00\xfe"})
        await client.xadd(
            "sagacity:orders",
            {
                "specversion": "1.0",
                "id": "big",
                "type": "orders.OrderPlaced",
                "data": b"x" * 400_000,
            },
        )
        await client.xadd(
            "sagacity:orders",
            {
                "specversion": "1.0",
                "id": "bad",
                "type": "orders.OrderPlaced",
                "data": b'{"order_ref": 7}',
            },
        )
        await client.xadd(
            "sagacity:orders",
            {
                "specversion": "1.0",
                "id": "deep",
                "type": "orders.OrderPlaced",
                "data": b"[" * 100_000,
            },
        )
        await client.xadd(
            "sagacity:payments",
            {
                "id": "who",
                "type": "payments.Unheard",
                "data": b"{}",
                "kind": "command",
            },
        )
        await place.publish(OrderPlaced("good"))
        await place.quiet(completed=1)

        async def all_there() -> bool:
            return len(await place.store.dead_letters()) >= 5

        await async_eventually(all_there, "five dead letters")
        letters = {letter.row.reason: letter.row for letter in await place.store.dead_letters()}
        assert set(letters) == {"undecodable", "oversized", "mistyped", "unknown-type"}
        assert b"\xff\x00\xfe" in letters["undecodable"].entry
        assert b"xxxx" in letters["oversized"].entry or "400" in letters["oversized"].error
        assert letters["unknown-type"].message_type == "payments.Unheard"
        pending = await client.xpending("sagacity:orders", "shop")
        assert pending["pending"] == 0
    await client.aclose()


async def test_a_hot_saga_is_handled_by_several_workers_without_loss(
    postgres_url: str, redis_url: str
) -> None:
    """Three workers, one instance, 300 messages: each has its effect once, versions are dense."""
    shop = Shop()
    hold = anyio.Event()

    async def wait(ref: str) -> None:
        await hold.wait()

    shop.before["charge"] = wait
    async with site(postgres_url, redis_url) as place:
        service = [shop.service(subscribers=False) for _ in range(3)]
        async with (
            place.worker(service[0], "a", batch_max=10),
            place.worker(service[1], "b", batch_max=10),
            place.worker(service[2], "c", batch_max=10),
        ):
            await place.publish(OrderPlaced("hot"))
            await place.publish(
                *(Poke("hot") for _ in range(300)), ids=[f"p{n}" for n in range(300)]
            )

            async def all_poked() -> bool:
                instance = await place.store.saga("Order", "hot")
                return instance is not None and instance.data.count(b'"p') >= 300

            await async_eventually(all_poked, "300 pokes", 60)
            hold.set()
            await place.quiet(completed=1)
        history = await place.store.history("Order", "hot")
        assert sorted(r.message_id for r in history if r.message_type == "orders.Poke") == sorted(
            f"p{n}" for n in range(300)
        )
        assert not await place.store.dead_letters()


async def test_a_command_from_outside_does_what_a_sagas_command_does(
    store_url: str, redis_url: str
) -> None:
    """Service.send writes it into the outbox of the caller's transaction; a rollback takes it back."""
    shop = Shop()
    service = shop.service()
    async with site(store_url, redis_url) as place, place.worker(service):
        sessions = session_factory(place.store, service=service)
        async with sessions() as session:
            await service.send(Charge("taken-back", 1), session=session)
            await session.rollback()
        async with sessions() as session:
            await service.send(Charge("o1", 1), session=session)
            await session.commit()
        await place.until(lambda: shop.times("charge", "o1") == 1, "the command is handled")
    assert shop.did == [("charge", "o1")]
