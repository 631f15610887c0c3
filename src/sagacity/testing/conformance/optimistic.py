"""An optimistic transaction: it may lock nothing, and writes nothing once somebody was faster."""

# ruff: noqa: D102 - the name of a test is its claim

from __future__ import annotations

from typing import Any

import anyio
import pytest

from sagacity.core.errors import Conflict, KeyTaken
from sagacity.core.plan import Plan
from sagacity.ports import PendingRow, Transaction
from sagacity.testing.conformance.stores import (
    StoreDatabase,
    Workers,
    correlation,
    dead_letter,
    inbox,
    instance,
    message_ids,
    outbox,
    parked,
    timeout,
    transition,
    workers,
)

__all__ = ["OptimisticSuite"]

PLANS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "instance": {"saga_inserts": [instance()]},
    "message": {"saga_inserts": [instance()], "inbox": [inbox()]},
    "step": {
        "saga_inserts": [instance()],
        "inbox": [inbox()],
        "outbox": [outbox("c1", "uid-of-o1")],
        "transitions": [transition()],
    },
    "timeout": {"saga_inserts": [instance()], "timeouts": [timeout()]},
    "parked": {"inbox": [inbox()], "parked": [parked("m2")], "woken": [("Order", "lane")]},
    "dead letter": {"inbox": [inbox()], "dead_letters": [dead_letter("m3")]},
    "all": {
        "saga_inserts": [instance()],
        "inbox": [inbox()],
        "correlations": [correlation("ann")],
        "outbox": [outbox("c1", "uid-of-o1")],
        "timeouts": [timeout()],
        "parked": [parked("m2")],
        "dead_letters": [dead_letter("m3")],
        "transitions": [transition()],
    },
}


class Broken(Exception):
    """Raised by a test inside a transaction."""


async def write(w: Workers, **lists: Any) -> list[PendingRow]:
    """Commits a plan on the first store, without locks."""
    async with w.first.transaction(optimistic=True) as transaction:
        return await transaction.write(Plan(now=transaction.now, **lists))


async def read(transaction: Transaction, *keys: str) -> dict[str, int]:
    """Key -> version of the instances with these keys."""
    loaded, _ = await transaction.read({"Order": keys}, [("Order", "m1")])
    assert not loaded.busy
    return {key: found.version for (_, key), found in loaded.instances.items()}


class OptimisticSuite:
    """One transaction that hopes for the best: what it writes, and when it refuses to."""

    @pytest.mark.parametrize("name", PLANS)
    async def test_it_writes_what_one_with_locks_writes(
        self, database: StoreDatabase, name: str
    ) -> None:
        async with workers(database) as w:
            pending = await write(w, **PLANS[name])
            assert message_ids(pending) == [
                row.envelope.id for row in PLANS[name].get("outbox", ())
            ]
            optimistic = await w.first.counts()
            known = await w.known(inbox=[("Order", "m1")], timeouts=[("uid-of-o1", "late", 1)])
            history = await w.second.history("Order", "o1")
            assert (await w.load("o1")).keys() == (
                {"o1"} if "saga_inserts" in PLANS[name] else set()
            )
            assert known.seen == ({("Order", "m1")} if "inbox" in PLANS[name] else set())
            assert bool(known.timeouts) == ("timeouts" in PLANS[name])
            assert len(history) == len(PLANS[name].get("transitions", ()))
            assert bool(await w.correlated("ann")) == ("correlations" in PLANS[name])
            assert bool(optimistic["dead_letters"]) == ("dead_letters" in PLANS[name])

    async def test_what_it_reads_is_what_was_committed(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(**PLANS["all"])
            async with w.first.transaction(optimistic=True) as transaction:
                loaded, known = await transaction.read(
                    {"Order": ["o1", "o2"], "Trip": ["o1"]},
                    [("Order", "m1"), ("Order", "m9")],
                    [("uid-of-o1", "late", 1), ("uid-of-o1", "late", 2)],
                    [("Order", "m2"), ("Order", "m9")],
                )
            assert loaded.instances == {("Order", "o1"): instance()}
            assert known.seen == {("Order", "m1")}
            assert known.timeouts == {("uid-of-o1", "late", 1)}
            assert known.parked == {("Order", "m2")}

    async def test_a_changed_instance_moves(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            async with w.first.transaction(optimistic=True) as transaction:
                assert await read(transaction, "o1", "o2") == {"o1": 1, "o2": 1}
                after = instance(version=2, data=b"new")
                await transaction.write(Plan(now=w.now, saga_updates=[(after, 1)], inbox=[inbox()]))
            assert await w.load("o1", "o2") == {"o1": after, "o2": instance("o2")}

    async def test_other_workers_may_read_and_write_meanwhile(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            async with w.first.transaction(optimistic=True) as transaction:
                assert await read(transaction, "o1") == {"o1": 1}
                with anyio.fail_after(20):
                    async with w.second.transaction(optimistic=True) as other:
                        assert await read(other, "o2") == {"o2": 1}
                        await other.write(
                            Plan(now=w.now, saga_updates=[(instance("o2", version=2), 1)])
                        )
                await transaction.write(Plan(now=w.now, saga_updates=[(instance(version=2), 1)]))
            assert {key: one.version for key, one in (await w.load("o1", "o2")).items()} == {
                "o1": 2,
                "o2": 2,
            }

    @pytest.mark.parametrize(
        "lists",
        [
            {"saga_updates": [(instance(version=2, data=b"late"), 1)]},
            {"saga_inserts": [instance("o2")]},
            {"saga_updates": [(instance("o3", version=2), 1)]},
            {"saga_inserts": [instance("o2")], "timeouts": [timeout(key="o2")]},
        ],
        ids=["its own change", "only another one", "the change of another one", "with more"],
    )
    async def test_an_instance_that_was_read_and_changed_is_a_conflict(
        self, database: StoreDatabase, lists: dict[str, Any]
    ) -> None:
        """Also where the plan leaves it alone: what was decided rests on it."""
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o3")])
            with pytest.raises(Conflict):  # noqa: PT012 - it is raised inside the transaction
                async with w.first.transaction(optimistic=True) as transaction:
                    await read(transaction, "o1", "o2", "o3")
                    async with w.second.transaction() as other:
                        faster = instance(version=2, data=b"first")
                        await other.write(Plan(now=w.now, saga_updates=[(faster, 1)]))
                    lists = {**lists, "inbox": [inbox()], "outbox": [outbox("c1")]}
                    await transaction.write(Plan(now=w.now, **lists))
            found = await w.load("o1", "o2", "o3")
            assert {key: one.version for key, one in found.items()} == {"o1": 2, "o3": 1}
            assert found["o1"].data == b"first"
            assert await w.pending() == []
            assert (await w.known(inbox=[("Order", "m1")])).seen == set()

    async def test_an_instance_that_another_one_holds_is_a_conflict(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            if database.serial:
                return  # whoever holds it holds everything, and is waited for
            async with w.second.transaction() as holder:
                await holder.load({"Order": ["o1"]})
                for changed in ("o1", "o2"):
                    with pytest.raises(Conflict):  # noqa: PT012 - raised inside the transaction
                        async with w.first.transaction(optimistic=True) as transaction:
                            await read(transaction, "o1", "o2")
                            after = instance(changed, version=2)
                            await transaction.write(Plan(now=w.now, saga_updates=[(after, 1)]))
                await holder.write(Plan(now=w.now, saga_updates=[(instance(version=2), 1)]))
            assert (await w.load("o1"))["o1"].version == 2
            assert (await w.load("o2"))["o2"].version == 1

    @pytest.mark.parametrize("faster", ["instance", "message", "all"])
    async def test_what_another_one_started_or_handled_is_a_conflict(
        self, database: StoreDatabase, faster: str
    ) -> None:
        async with workers(database) as w:
            with pytest.raises(Conflict):  # noqa: PT012 - it is raised inside the transaction
                async with w.first.transaction(optimistic=True) as transaction:
                    assert await read(transaction, "o1", "o2") == {}
                    async with w.second.transaction() as other:
                        await other.write(Plan(now=w.now, **PLANS[faster]))
                    mine: dict[str, Any] = {
                        "message": {"saga_inserts": [instance("o2")], "inbox": [inbox()]},
                    }.get(faster, {"saga_inserts": [instance(data=b"late"), instance("o2")]})
                    await transaction.write(Plan(now=w.now, **mine))
            found = await w.load("o1", "o2")
            assert found == {"o1": instance()}
            assert len(await w.second.history("Order", "o1")) == (faster == "all")

    async def test_a_timeout_that_another_one_took_over_is_a_conflict(
        self, database: StoreDatabase
    ) -> None:
        """Also where it changed no instance: a timeout that was ignored, or whose handler failed for good."""
        due, row = ("uid-of-o1", "late", 1), ("uid-of-o1", "late")
        failed: dict[str, Any] = {
            "timeouts_cancelled": [row],
            "dead_letters": [dead_letter("t1")],
        }
        async with workers(database) as w:
            await w.write(saga_inserts=[instance()], timeouts=[timeout()])
            with pytest.raises(Conflict):  # noqa: PT012 - it is raised inside the transaction
                async with w.first.transaction(optimistic=True) as transaction:
                    _, known = await transaction.read({"Order": ["o1"]}, [], [due])
                    assert known.timeouts == {due}
                    async with w.second.transaction() as other:
                        await other.write(Plan(now=w.now, **failed))
                    await transaction.write(Plan(now=w.now, **failed))
            assert (await w.first.counts())["dead_letters"] == 1
            async with w.first.transaction(optimistic=True) as transaction:
                _, known = await transaction.read({"Order": ["o1"]}, [], [due])
                assert known.timeouts == set()
                # One that is not there is no error, unless it was there when it was read.
                await transaction.write(Plan(now=w.now, **failed))

    async def test_a_timeout_that_is_still_armed_is_taken_over(
        self, database: StoreDatabase
    ) -> None:
        due = ("uid-of-o1", "late", 1)
        async with workers(database) as w:
            await w.write(saga_inserts=[instance()], timeouts=[timeout(), timeout("other")])
            async with w.first.transaction(optimistic=True) as transaction:
                await transaction.read(
                    {"Order": ["o1"]}, [], [due, ("uid-of-o1", "other", 1), ("uid-of-o1", "x", 1)]
                )
                plan = Plan(
                    now=w.now,
                    saga_updates=[(instance(version=2), 1)],
                    timeouts_cancelled=[("uid-of-o1", "late"), ("uid-of-o1", "never set")],
                    timeouts=[timeout(generation=2)],
                )
                await transaction.write(plan)
            again = [due, ("uid-of-o1", "late", 2), ("uid-of-o1", "other", 1)]
            assert (await w.known(timeouts=again)).timeouts == set(again[1:])

    async def test_a_taken_key_is_told_as_ever(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(correlations=[correlation("ann", "o9", unique=True)])
            with pytest.raises(KeyTaken) as caught:
                await write(
                    w,
                    saga_inserts=[instance()],
                    correlations=[correlation("ann", unique=True)],
                )
            assert caught.value.owner == "o9"
            assert await w.load("o1") == {}

    async def test_an_exception_before_the_write_writes_nothing(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            with pytest.raises(Broken):  # noqa: PT012 - it is raised inside the transaction
                async with w.first.transaction(optimistic=True) as transaction:
                    await read(transaction, "o1")
                    raise Broken
            assert await w.is_untouched()
            await write(w, **PLANS["all"])

    async def test_published_rows_are_forgotten_and_older_ones_come_along(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            first = await write(w, outbox=[outbox("c1", "lane"), outbox("c2", "lane")])
            async with w.first.transaction(optimistic=True) as transaction:
                rows = await transaction.write(
                    Plan(now=w.now, outbox=[outbox("c3", "lane")]), [first[0].seq]
                )
            assert message_ids(rows) == ["c2", "c3"]
            assert await w.pending() == ["c2", "c3"]

    @pytest.mark.parametrize("many", [1, 50, 500])
    async def test_of_any_size(self, database: StoreDatabase, many: int) -> None:
        async with workers(database) as w:
            keys = [f"o{number}" for number in range(many)]
            await w.write(saga_inserts=[instance(key) for key in keys])
            async with w.first.transaction(optimistic=True) as transaction:
                found = await read(transaction, *keys)
                assert set(found) == set(keys)
                moved = [(instance(key, version=2), 1) for key in keys]
                await transaction.write(Plan(now=w.now, saga_updates=moved))
            assert {one.version for one in (await w.load(*keys)).values()} == {2}
            with pytest.raises(Conflict):
                async with w.first.transaction(optimistic=True) as transaction:
                    await transaction.write(Plan(now=w.now, saga_updates=moved))
