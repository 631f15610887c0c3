"""The suites of `sagacity.ports.Inspector` and `RetentionStore`."""

# ruff: noqa: D102 - the name of a test is its claim

from __future__ import annotations

import re
from typing import Any

import pytest

from sagacity.core.errors import ConfigurationError
from sagacity.core.instance import Status
from sagacity.ports import Retention, SagaRow
from sagacity.testing.conformance.stores import (
    SECOND,
    StoreDatabase,
    correlation,
    dead_letter,
    envelope,
    inbox,
    instance,
    outbox,
    parked,
    timeout,
    transition,
    workers,
)
from sagacity.testing.conformance.tasks import GAP, LEASE, work

__all__ = ["OperatorSuite"]

DAY = 86_400 * SECOND


def keeping(**days: int) -> Retention:
    """Ten days for everything but what is named."""
    names = ("inbox_us", "outbox_us", "history_us", "finished_us", "dead_letters_us")
    return Retention(**{name: days.get(name.removesuffix("_us"), 10) * DAY for name in names})


class OperatorSuite:
    """What operators see, replay and throw away."""

    # ------------------------------------------------------------------------------------------ lists

    async def test_what_has_not_moved_for_longest_comes_first(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(
                saga_inserts=[
                    instance("o1", updated_at=30, status=Status.COMPLETED),
                    instance("o2", updated_at=10, state="creating", version=4, started_at=5),
                    instance("o3", updated_at=20, status=Status.STUCK),
                    instance("t1", updated_at=20, type="Trip"),
                ]
            )

            async def keys(**asked: Any) -> list[str]:
                return [row.saga_key for row in await w.second.sagas(**asked)]

            assert await keys() == ["o2", "o3", "t1", "o1"]
            assert await keys(saga_type="Order") == ["o2", "o3", "o1"]
            assert await keys(status="running") == ["o2", "t1"]
            assert await keys(state="waiting", saga_type="Order") == ["o3", "o1"]
            assert await keys(status="compensated") == []
            [first] = await w.first.sagas(limit=1)
            assert (first.saga_type, first.uid, first.version) == ("Order", "uid-of-o2", 4)
            assert (first.status, first.state) == ("running", "creating")
            assert (first.started_at, first.updated_at) == (5, 10)

    async def test_lists_can_be_paged(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(
                saga_inserts=[
                    instance(
                        f"key {n:02}",
                        type=f"Type{n % 3}",
                        updated_at=n // 5,
                        status=list(Status)[n % 5],
                    )
                    for n in range(23)
                ]
            )
            whole = await w.first.sagas(limit=100)
            assert len(whole) == 23
            paged: list[SagaRow] = []
            after = ""
            while page := await w.first.sagas(limit=4, after=after):
                paged += page
                after = page[-1].cursor
            assert paged == whole

    async def test_one_instance(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(data=b"[1]")])
            assert await w.first.saga("Order", "o1") == instance(data=b"[1]")
            assert await w.first.saga("Order", "O1") is None
            assert await w.first.saga("Trip", "o1") is None

    async def test_the_history_is_of_this_instance(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            lines = [transition(n, effects=b"\x00" * n, handler=f"h{n}") for n in range(1, 12)]
            await w.write(transitions=lines[:6])
            await w.write(transitions=[transition(key="o2"), transition(saga_type="Trip")])
            await w.write(transitions=lines[6:], saga_inserts=[instance()])
            assert await w.second.history("Order", "o1") == lines
            assert await w.second.history("Order", "o9") == []

    async def test_the_history_of_a_former_instance_is_not_shown(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(transitions=[transition(1, uid="former"), transition(2, uid="former")])
            assert len(await w.first.history("Order", "o1")) == 2
            await w.write(saga_inserts=[instance()], transitions=[transition(1)])
            assert await w.first.history("Order", "o1") == [transition(1)]

    async def test_counts(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            assert not any((await w.first.counts()).values())
            await w.write(
                saga_inserts=[instance("o1"), instance("o2"), instance("o3", status=Status.STUCK)],
                outbox=[outbox("c1"), outbox("c2")],
                timeouts=[timeout()],
                parked=[
                    parked("m1"),
                    parked("m2", consumer="Trip#t1"),
                    parked("m3", consumer="Trip#t2"),
                ],
                dead_letters=[dead_letter()],
            )
            w.clock.advance(3)
            counts = await w.second.counts()
            assert {name: number for name, number in counts.items() if number} == {
                "sagas.running": 2,
                "sagas.stuck": 1,
                "outbox.pending": 2,
                "outbox.oldest_us": 3 * SECOND,
                "timeouts": 1,
                "parked": 3,
                "parked.Order": 1,
                "parked.Trip": 2,
                "dead_letters": 1,
            }

    # ----------------------------------------------------------------------------------- dead letters

    async def test_dead_letters_newest_first(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            letters = [
                dead_letter("m1", at=10),
                dead_letter("m2", at=30, consumer="Trip", topic="odd\x00topic", message_type="?"),
                dead_letter("m3", at=20, error="x" * 20_000, decoded=False, entry=b"\x00raw"),
            ]
            await w.write(dead_letters=letters)
            found = await w.second.dead_letters()
            assert [one.row for one in found] == [letters[1], letters[2], letters[0]]
            assert len({one.id for one in found}) == 3
            assert {one.replayed_at for one in found} == {None}
            assert [one.row for one in await w.first.dead_letters(limit=1)] == [letters[1]]
            of_order = await w.first.dead_letters(consumer="Order")
            assert [one.row.message_id for one in of_order] == ["m3", "m1"]

    async def test_a_replayed_letter_is_parked_for_its_saga(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(dead_letters=[dead_letter("m1", lane="user=ann", reason="missing")])
            [letter] = await w.first.dead_letters()
            assert await w.second.replay([letter.id]) == 1
            [row] = (await w.first.due(["Order"], 10)).parked
            assert (row.consumer, row.message_id, row.reason) == ("Order", "m1", "retry")
            assert (row.saga_type, row.saga_key, row.lane) == ("Order", "o1", "user=ann")
            assert (row.attempts, row.due_at, row.parked_at) == (0, w.now, w.now)
            assert row.envelope == envelope("m1")
            assert await w.first.dead_letters() == []
            assert await w.first.replay([letter.id]) == 0
            assert (await w.first.counts())["dead_letters"] == 0

    async def test_a_replayed_command_is_work_again(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            letter = dead_letter(
                "m1", consumer="pay", saga_type="", saga_key="", lane="a", sequence=1
            )
            await w.write(dead_letters=[letter], parked=[work("m2", "a", 2)])
            [found] = await w.first.dead_letters()
            assert await w.first.replay([found.id, found.id, 987_654]) == 1
            [task] = await w.first.claim({"pay": 5}, LEASE, GAP)
            assert (task.row.message_id, task.row.sequence, task.row.lane) == ("m1", 1, "a")

    async def test_a_replayed_letter_that_concerned_nobody_yet_goes_over_the_bus(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            [own] = await w.write(outbox=[outbox("m2", "a")])
            await w.first.published([own.seq])
            letters = [
                dead_letter(name, consumer="shop!", saga_type="", saga_key="", reason="killer")
                for name in ("m1", "m2", "m3")
            ]
            seen = [inbox(name, consumer="shop!") for name in ("m1", "m2", "m3")]
            await w.write(dead_letters=letters, inbox=seen)
            ids = [
                found.id for found in await w.first.dead_letters() if found.row.message_id != "m3"
            ]
            assert await w.second.replay(ids) == 2
            assert sorted(await w.pending()) == ["m1", "m2"]
            assert (await w.first.counts())["parked"] == 0
            asked = [("shop!", name) for name in ("m1", "m2", "m3")]
            assert (await w.known(inbox=asked)).seen == {("shop!", "m3")}
            assert await w.second.replay(ids) == 0

    async def test_what_cannot_be_replayed_is_left_out(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(dead_letters=[dead_letter("m1", decoded=False, entry=b"raw")])
            [letter] = await w.first.dead_letters()
            assert await w.first.replay([letter.id]) == 0
            assert await w.first.replay([]) == 0
            assert len(await w.first.dead_letters()) == 1
            assert (await w.first.counts())["parked"] == 0

    # -------------------------------------------------------------------------------------- retention

    async def test_only_what_is_old_and_finished_goes(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            old, young = w.now - 11 * DAY, w.now - 9 * DAY

            def finished(key: str, at: int, status: Status = Status.COMPLETED) -> Any:
                return instance(key, status=status, updated_at=at)

            await w.write(
                saga_inserts=[
                    finished("old", old),
                    finished("undone", old, Status.COMPENSATED),
                    finished("young", young),
                    finished("running", old, Status.RUNNING),
                    finished("stuck", old, Status.STUCK),
                    finished("compensating", old, Status.COMPENSATING),
                ],
                correlations=[correlation("ann", "old", unique=True), correlation("bob", "young")],
                transitions=[
                    transition(1, key="old", at=old),
                    transition(2, key="old", at=young),
                ],
                dead_letters=[dead_letter("m1", at=old), dead_letter("m2", at=young)],
                timeouts=[timeout(key="running", due_at=old)],
                parked=[parked("m9", parked_at=old, due_at=old)],
            )
            assert await w.second.clean(keeping(), 1000) == 4
            assert (
                await w.load("old", "undone", "young", "running", "stuck", "compensating")
            ).keys() == {
                "young",
                "running",
                "stuck",
                "compensating",
            }
            assert [t.version for t in await w.first.history("Order", "old")] == [2]
            assert [d.row.message_id for d in await w.first.dead_letters()] == ["m2"]
            assert await w.correlated("ann") == ()
            assert await w.correlated("bob") == ("young",)
            counts = await w.first.counts()
            assert (counts["timeouts"], counts["parked"]) == (1, 1)
            assert await w.first.clean(keeping(), 1000) == 0

    async def test_the_inbox_and_the_outbox_go_by_age(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(
                inbox=[inbox("old")], outbox=[outbox("left", "a"), outbox("waits", "b")]
            )
            await w.first.published([rows[0].seq])
            w.clock.advance(2 * DAY / SECOND)
            await w.write(inbox=[inbox("young")], outbox=[outbox("young")])
            w.clock.advance(9 * DAY / SECOND)
            assert await w.first.clean(keeping(), 1000) == 2
            asked = [("Order", "old"), ("Order", "young")]
            assert (await w.known(inbox=asked)).seen == {("Order", "young")}
            # What waits for the bus stays, however old; what left and went is unknown again.
            assert await w.pending() == ["waits", "young"]
            assert len(await w.write(outbox=[outbox("left")])) == 1
            assert await w.write(outbox=[outbox("waits")]) == []

    async def test_a_limit_bounds_each_kind(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(
                inbox=[inbox(f"m{n}") for n in range(5)],
                dead_letters=[dead_letter(f"m{n}", at=0) for n in range(3)],
            )
            w.clock.advance(11 * DAY / SECOND)
            assert [await w.first.clean(keeping(), 2) for _ in range(4)] == [4, 3, 1, 0]

    async def test_each_kind_has_its_own_time(self, database: StoreDatabase) -> None:
        kinds: dict[str, dict[str, Any]] = {
            "inbox": {"inbox": [inbox()]},
            "history": {"transitions": [transition(at=0)]},
            "finished": {"saga_inserts": [instance(status=Status.COMPLETED, updated_at=0)]},
            "dead_letters": {"dead_letters": [dead_letter(at=0)]},
        }
        async with workers(database) as w:
            for lists in kinds.values():
                await w.write(**lists)
            [row] = await w.write(outbox=[outbox("c1")])
            await w.first.published([row.seq])
            w.clock.advance(5 * DAY / SECOND)
            # Rows made with `at` = 0 are as old as time; the long retention must keep even those.
            ages = dict.fromkeys([*kinds, "outbox"], 100_000)
            assert await w.first.clean(keeping(**ages), 100) == 0
            for kind in [*kinds, "outbox"]:
                ages[kind] = 4
                assert await w.first.clean(keeping(**ages), 100) == 1, kind

    async def test_lanes_and_tombstones_outlive_their_work(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(parked=[work("a1", "a", 1, parked_at=w.now)])
            [task] = await w.first.claim({"pay": 1}, LEASE, GAP)
            w.clock.advance(11 * DAY / SECOND)
            assert await w.first.clean(keeping(), 100) == 0
            assert await w.first.renew([task], LEASE), "the lane of a parked row must stay"

    async def test_a_wrong_cursor_is_told(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            for wrong in ("?", "12", "12 Order"):
                with pytest.raises(ConfigurationError, match=re.escape(wrong)):
                    await w.first.sagas(after=wrong)
