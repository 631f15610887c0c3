"""The suite of `sagacity.ports.TaskStore` and `Work`."""

# ruff: noqa: D102 - the name of a test is its claim

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from sagacity.core.errors import ConfigurationError, Conflict
from sagacity.core.plan import ParkedRow
from sagacity.ports import Finish, Task
from sagacity.testing.conformance.stores import (
    SECOND,
    StoreDatabase,
    Workers,
    dead_letter,
    envelope,
    message_ids,
    outbox,
    parked,
    workers,
)

__all__ = ["TaskSuite"]

LEASE = 30 * SECOND
GAP = 5 * SECOND


def work(message_id: str, lane: str = "", sequence: int = 0, **fields: Any) -> ParkedRow:
    """A command that waits for a participant."""
    values: dict[str, Any] = {
        "consumer": "pay",
        "saga_type": "",
        "saga_key": "",
        "lane": lane,
        "sequence": sequence,
        "reason": "work",
        "attempts": 0,
    }
    return parked(message_id, **{**values, **fields})


def undo(message_id: str, of: str, lane: str = "", **fields: Any) -> ParkedRow:
    """An undo command that waits for a participant."""
    return work(message_id, lane, envelope=envelope(message_id, undoes=of), **fields)


class Participants:
    """Claims and ends tasks on both workers."""

    def __init__(self, w: Workers) -> None:
        self._w = w

    async def park(self, *rows: ParkedRow) -> None:
        """Parks commands now."""
        now = self._w.now
        fresh = [row if row.parked_at != 500 else _parked_at(row, now) for row in rows]
        await self._w.write(parked=fresh)

    async def claim(self, most: int = 10, *, second: bool = False) -> list[Task]:
        """Up to `most` tasks for the consumer ``pay`` and as many for ``refund``."""
        store = self._w.second if second else self._w.first
        return await store.claim({"pay": most, "refund": most}, LEASE, GAP)

    async def claimed(self, most: int = 10, *, second: bool = False) -> list[str]:
        """The message ids of such a claim, sorted."""
        return sorted(task.row.message_id for task in await self.claim(most, second=second))

    async def one(self) -> Task:
        """The only task that is ready."""
        [task] = await self.claim()
        return task

    async def done(self, *tasks: Task) -> None:
        """Ends tasks well."""
        await self._w.first.finish([Finish(task=task) for task in tasks])


def _parked_at(row: ParkedRow, now: int) -> ParkedRow:
    return msgspec.structs.replace(row, parked_at=now)


class TaskSuite:
    """Who gets which task, for how long, and how it ends."""

    # ------------------------------------------------------------------------------------ handing out

    async def test_a_task_is_handed_out_once(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p, row = Participants(w), work("m1", parked_at=9, due_at=w.now, error="before")
            await p.park(row)
            task = await p.one()
            assert task.row == row
            assert task.lease_until == w.now + LEASE
            assert task.token
            assert not task.tombstone
            assert await p.claim() == []
            assert await p.claim(second=True) == []

    async def test_two_workers_share_the_tasks(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            names = [f"m{n}" for n in range(20)]
            await p.park(*(work(name, f"lane{n % 7}", n // 7 + 1) for n, name in enumerate(names)))
            done: list[str] = []

            async def participant(second: bool) -> None:
                while True:
                    tasks = await p.claim(2, second=second)
                    if not tasks and len(done) == len(names):
                        return
                    done.extend(task.row.message_id for task in tasks)
                    await p.done(*tasks)

            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    group.start_soon(participant, False)
                    group.start_soon(participant, True)
            assert sorted(done) == sorted(names)
            for lane in range(7):
                of_lane = [name for name in done if int(name[1:]) % 7 == lane]
                assert of_lane == sorted(of_lane, key=lambda name: int(name[1:]))

    async def test_the_limit_is_for_each_consumer(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(*(work(f"p{n}") for n in range(5)))
            await p.park(*(work(f"r{n}", consumer="refund") for n in range(5)))
            await p.park(work("x", consumer="ship"))
            tasks = await w.first.claim({"pay": 2, "refund": 3, "ship": 0}, LEASE, GAP)
            assert sorted(task.row.consumer for task in tasks) == ["pay"] * 2 + ["refund"] * 3
            assert await w.first.claim({}, LEASE, GAP) == []

    async def test_only_due_work_is_handed_out(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(
                work("now", due_at=w.now),
                work("later", due_at=w.now + SECOND),
                work("held", due_at=None),
                parked("saga's", consumer="pay"),
            )
            assert await w.first.next_task_at(["pay", "refund"]) == w.now + SECOND
            assert await w.first.next_task_at(["refund"]) is None
            assert await p.claimed() == ["now"]
            w.clock.advance(1)
            assert await p.claimed() == ["later"]
            assert await w.first.next_task_at(["pay"]) is None

    # ------------------------------------------------------------------------------------------ lanes

    async def test_a_lane_has_one_task_at_a_time(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1), work("a2", "a", 2), work("b1", "b", 1))
            first = await p.claim()
            assert [task.row.message_id for task in first] == ["a1", "b1"]
            assert await p.claim(second=True) == []
            await p.done(first[0])
            assert await p.claimed(second=True) == ["a2"]

    async def test_a_lane_spans_consumers(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1), work("a2", "a", 2, consumer="refund"))
            task = await p.one()
            assert task.row.message_id == "a1"
            assert await w.second.claim({"refund": 1}, LEASE, GAP) == []
            await p.done(task)
            assert await p.claimed() == ["a2"]

    async def test_numbers_are_waited_for(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a2", "a", 2))
            assert await p.claim() == []
            await p.park(work("a1", "a", 1))
            task = await p.one()
            assert task.row.message_id == "a1"
            await p.done(task)
            assert await p.claimed() == ["a2"]

    async def test_a_gap_is_waited_for_so_long(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a3", "a", 3))
            w.clock.advance((GAP - 1) / SECOND)
            assert await p.claim() == []
            w.clock.advance(1 / SECOND)
            task = await p.one()
            assert task.row.message_id == "a3"
            await p.done(task)
            # What came after all goes at once, and what follows needs no further wait.
            await p.park(work("a1", "a", 1), work("a4", "a", 4))
            late = await p.one()
            assert late.row.message_id == "a1"
            await p.done(late)
            assert await p.claimed() == ["a4"]

    async def test_a_gap_in_one_lane_holds_up_no_other(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(*(work(f"a{n}", "a", n) for n in range(2, 60)), work("b1", "b", 1))
            assert await p.claimed(most=1) == ["b1"]

    async def test_a_row_without_a_lane_waits_for_nobody(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1", sequence=5), work("m2", sequence=9), work("m3"))
            assert await p.claimed() == ["m1", "m2", "m3"]

    async def test_a_row_without_a_number_waits_for_its_lane_only(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1", "a"), work("a2", "a", 2))
            task = await p.one()
            assert task.row.message_id == "m1"
            await p.park(work("m2", "a"))
            assert await p.claim() == []
            await p.done(task)
            assert await p.claimed() == ["m2"]

    async def test_the_lane_waits_for_a_retry(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1), work("a2", "a", 2, due_at=0))
            task = await p.one()
            retry_at = w.now + 60 * SECOND
            await w.first.finish([Finish(task=task, retry_at=retry_at, error="no answer")])
            w.clock.advance(59)
            assert await p.claim() == []
            w.clock.advance(1)
            again = await p.one()
            assert (again.row.message_id, again.row.attempts) == ("a1", 1)
            assert again.row.error == "no answer"
            assert again.row.due_at == retry_at
            assert again.token != task.token

    # ------------------------------------------------------------------------------------------- undo

    async def test_an_undo_waits_for_no_number(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a2", "a", 2), undo("u1", "a1", "a", consumer="refund"))
            assert await p.claimed() == ["u1"]

    async def test_an_undo_waits_for_the_task_under_way(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1))
            task = await p.one()
            await p.park(undo("u1", "a1", "a", consumer="refund"))
            assert await p.claim(second=True) == []
            await p.done(task)
            assert await p.claimed(second=True) == ["u1"]

    async def test_an_undo_does_not_wait_for_a_retry(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1))
            await w.first.finish([Finish(task=await p.one(), retry_at=w.now + LEASE)])
            await p.park(undo("u1", "a1", "a"))
            assert await p.claimed() == ["u1"]

    async def test_a_finished_undo_leaves_a_tombstone(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(undo("u1", "a1", "a", consumer="refund"))
            undoing = await p.one()
            assert not undoing.tombstone
            await p.done(undoing)
            await p.park(work("a1", "a", 1), work("b1", "b", 1))
            tasks = {task.row.message_id: task.tombstone for task in await p.claim(second=True)}
            assert tasks == {"a1": True, "b1": False}

    async def test_an_undo_to_be_tried_again_leaves_none(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(undo("u1", "a1", "a"))
            await w.first.finish([Finish(task=await p.one(), retry_at=w.now + LEASE)])
            await p.park(work("a1", "a", 1))
            assert not (await p.one()).tombstone

    async def test_an_undo_does_not_count_as_a_number(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(undo("u1", "a1", "a", sequence=1))
            await p.done(await p.one())
            await p.park(work("a2", "a", 2))
            assert await p.claim() == []
            await p.park(work("a1", "a", 1))
            assert await p.claimed() == ["a1"]

    # ----------------------------------------------------------------------------------------- leases

    async def test_an_expired_lease_is_handed_out_again(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"), work("a1", "a", 1), work("a2", "a", 2))
            old = {task.row.message_id: task for task in await p.claim()}
            w.clock.advance((LEASE - 1) / SECOND)
            assert await p.claim(second=True) == []
            w.clock.advance(1)
            new = {task.row.message_id: task for task in await p.claim(second=True)}
            assert new.keys() == old.keys() == {"m1", "a1"}
            for name, task in new.items():
                assert task.token != old[name].token

    async def test_a_holder_that_vanished_has_used_up_an_attempt(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1", attempts=2), work("a1", "a", 1))
            for lives in range(3):
                tasks = {task.row.message_id: task for task in await p.claim(second=lives % 2 == 1)}
                assert {name: task.row.attempts for name, task in tasks.items()} == {
                    "m1": 2 + lives,
                    "a1": lives,
                }
                w.clock.advance(LEASE / SECOND)
            last = {task.row.message_id: task for task in await p.claim()}
            await w.first.finish([Finish(task=last["m1"], retry_at=w.now, error="no answer")])
            assert (await p.one()).row.attempts == 6
            await w.first.finish([Finish(task=last["a1"], retry_at=w.now, counts=False)])
            assert (await p.one()).row.attempts == 3

    async def test_a_lease_that_ended_in_time_uses_up_none(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"))
            task = await p.one()
            w.clock.advance((LEASE - 1) / SECOND)
            [task] = await w.first.renew([task], LEASE)
            w.clock.advance((LEASE - 1) / SECOND)
            await w.first.finish([Finish(task=task, retry_at=w.now, counts=False)])
            w.clock.advance(10 * LEASE / SECOND)
            assert (await p.one()).row.attempts == 0

    async def test_a_lost_task_does_not_free_the_lane_of_its_new_holder(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1), work("b1", "b", 1))
            tasks = {task.row.lane: task for task in await p.claim()}
            w.clock.advance(LEASE / SECOND)
            assert len(await w.first.renew([tasks["b"]], LEASE)) == 1
            assert await p.claimed(second=True) == ["a1"]
            await p.park(undo("u1", "a1", "a"))
            await p.done(*tasks.values())
            assert await p.claim() == [], "the lane is worked on by another"

    async def test_a_lost_lease_writes_nothing(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"), work("a1", "a", 1))
            lost = await p.claim()
            w.clock.advance(LEASE / SECOND)
            new = await p.claim(second=True)
            assert len(new) == 2
            finishes = [Finish(task=task, outbox=(outbox(task.row.message_id),)) for task in lost]
            assert await w.first.finish(finishes) == []
            assert await w.first.renew(lost, LEASE) == []
            for finish in finishes:
                async with w.first.work(finish.task) as unit:
                    with pytest.raises(Conflict):
                        await unit.finish(finish)
            assert await w.pending() == []
            assert len(await w.second.renew(new, LEASE)) == 2
            assert (await w.first.counts())["parked"] == 2

    async def test_lost_and_held_in_one_call(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"))
            lost = await p.one()
            w.clock.advance(LEASE / SECOND)
            await p.claim(second=True)
            await p.park(work("m2"))
            held = await p.one()
            rows = await w.first.finish(
                [
                    Finish(task=task, outbox=(outbox(f"reply to {task.row.message_id}"),))
                    for task in (lost, held)
                ]
            )
            assert message_ids(rows) == ["reply to m2"]

    async def test_a_lease_lost_to_another_task_of_the_lane_is_lost(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1))
            lost = await p.one()
            w.clock.advance(LEASE / SECOND)
            await p.park(undo("u1", "a1", "a"))
            [undoing] = await p.claim(second=True)
            if undoing.row.message_id == "u1":
                # The lane works on the undo now: the command may not end beside it.
                assert await w.first.renew([lost], LEASE) == []
                await w.first.finish([Finish(task=lost)])
                assert (await w.first.counts())["parked"] == 2

    async def test_a_renewed_lease_lasts(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"), work("a1", "a", 1), undo("u1", "a0", "a"))
            tasks = await p.claim()
            assert len(tasks) == 2
            w.clock.advance((LEASE - 1) / SECOND)
            renewed = await w.first.renew(tasks, LEASE)
            assert {task.lease_until for task in renewed} == {w.now + LEASE}
            assert {task.token for task in renewed} == {task.token for task in tasks}
            assert await w.first.renew([], LEASE) == []
            w.clock.advance((LEASE - 1) / SECOND)
            assert await p.claim(second=True) == []
            await p.done(*renewed)
            assert await p.claimed() == ["a1"]

    # -------------------------------------------------------------------------------------------- end

    async def test_done_is_done_once(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"))
            task = await p.one()
            await p.done(task)
            assert (await w.first.counts())["parked"] == 0
            assert await w.first.finish([Finish(task=task, outbox=(outbox("late"),))]) == []
            assert await w.first.finish([]) == []

    async def test_replies_leave_in_their_lane(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await w.write(outbox=[outbox("older", "a")])
            await p.park(work("m1"))
            replies = (outbox("r1", "a"), outbox("r2"), outbox("r3", "a"))
            rows = await w.first.finish([Finish(task=await p.one(), outbox=replies)])
            assert message_ids(rows) == ["older", "r1", "r2", "r3"]
            assert await w.pending() == ["older", "r1", "r2", "r3"]

    async def test_a_try_that_does_not_count(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1", attempts=3))
            await w.first.finish([Finish(task=await p.one(), retry_at=w.now, counts=False)])
            again = await p.one()
            assert again.row.attempts == 3

    async def test_a_dead_letter_ends_the_task(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("a1", "a", 1), work("a2", "a", 2))
            letter = dead_letter(
                "a1", consumer="pay", saga_type="", saga_key="", lane="a", sequence=1
            )
            await w.first.finish(
                [Finish(task=await p.one(), dead_letter=letter, outbox=(outbox("failed"),))]
            )
            assert [found.row for found in await w.first.dead_letters()] == [letter]
            assert await w.pending() == ["failed"]
            assert await p.claimed() == ["a2"]

    # ------------------------------------------------------------------------------------------- work

    async def test_work_ends_a_task_without_a_session(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await w.write(outbox=[outbox("older", "a")])
            await p.park(work("m1"))
            task = await p.one()
            async with w.first.work(task) as unit:
                rows = await unit.finish(Finish(task=task, outbox=(outbox("r1", "a"),)))
            assert message_ids(rows) == ["older", "r1"]
            assert (await w.second.counts())["parked"] == 0

    async def test_leaving_work_without_an_end_changes_nothing(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"))
            task = await p.one()
            async with w.first.work(task):
                pass
            assert await p.claim() == []
            assert await w.first.renew([task], LEASE)

    async def test_a_store_without_sql_has_no_session(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            p = Participants(w)
            await p.park(work("m1"))
            async with w.first.work(await p.one()) as unit:
                if database.sessions:
                    assert unit.session is unit.session
                else:
                    with pytest.raises(ConfigurationError):
                        _ = unit.session
