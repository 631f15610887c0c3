"""The suite of `sagacity.ports.MarkStore`: what a store remembers of its bus."""

# ruff: noqa: D102 - the name of a test is its claim

from __future__ import annotations

import pytest

from sagacity.core.errors import Conflict
from sagacity.ports import Lost, Mark, Witness
from sagacity.testing.conformance.stores import (
    LARGEST,
    SECOND,
    StoreDatabase,
    outbox,
    workers,
)

__all__ = ["MarkSuite"]


class MarkSuite:
    """Marks, the epoch, and rows that are pending once more."""

    async def test_a_new_store_has_met_no_bus(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            assert await w.first.witness() == Witness(epoch="", identity="", settled=0, marks={})
            assert await w.first.marks("orders") == []

    async def test_what_has_left_is_settled(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(outbox=[outbox(f"c{n}") for n in range(4)])
            seqs = [row.seq for row in rows]
            assert (await w.first.witness()).settled < seqs[0]
            await w.first.published([seqs[0], seqs[1], seqs[3]])
            assert seqs[1] <= (await w.second.witness()).settled < seqs[2]
            await w.first.published([seqs[2]])
            assert (await w.first.witness()).settled >= seqs[3]

    async def test_marks_are_kept_newest_first(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            marks = [Mark("orders", at, f"{at}-0", at * 10) for at in (1, 3, 2)]
            other = Mark("users", 9, "9-9", LARGEST)
            await w.first.record([*marks, other])
            assert await w.second.marks("orders") == [marks[1], marks[2], marks[0]]
            assert (await w.second.witness()).marks == {"orders": marks[1], "users": other}
            replaced = Mark("orders", 2, "2-5", 25)
            await w.first.record([replaced], dropped=[marks[1], Mark("orders", 77, "", 0)])
            assert await w.first.marks("orders") == [replaced, marks[0]]
            await w.first.record([])
            assert len(await w.first.marks("orders")) == 2

    async def test_lost_rows_are_pending_again(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            old = await w.write(outbox=[outbox(f"old{n}", "lane") for n in range(3)])
            await w.first.published([row.seq for row in old])
            w.clock.advance(100)
            late = w.now
            young = await w.write(
                outbox=[outbox("young", "lane"), outbox("user", topic="users"), outbox("waits")]
            )
            await w.first.published([row.seq for row in young[:2]])
            lost = [Lost("orders", after=old[1].seq, since=LARGEST)]
            seen = await w.first.witness()
            count = await w.first.republish(lost, seen=seen, epoch="e1", identity="i1")
            assert count == 2
            assert await w.pending() == ["old2", "young", "waits"]
            found = await w.second.witness()
            assert (found.epoch, found.identity) == ("e1", "i1")
            # By time: row numbers are not in the order of commits.
            lost = [Lost("orders", after=LARGEST, since=late - SECOND)]
            await w.first.published([row.seq for row in [*old, *young]])
            assert await w.first.republish(lost, seen=found, epoch="e2", identity="i1") == 2
            assert await w.pending() == ["young", "waits"]
            assert [row.created_at for row in await w.first.pending(LARGEST, 9)] == [late, late]

    async def test_all_other_topics(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(
                outbox=[outbox(f"{topic}{n}", topic=topic) for n in (1, 2) for topic in "abc"]
            )
            await w.first.published([row.seq for row in rows])
            marks = [Mark(topic, 1, "1-0", rows[-1].seq) for topic in "abc"]
            await w.first.record(marks)
            lost = [Lost("a", after=rows[0].seq, since=LARGEST), Lost("", after=0, since=LARGEST)]
            lost.append(Lost("c", after=LARGEST, since=LARGEST))
            seen = await w.first.witness()
            assert await w.first.republish(lost, seen=seen, epoch="e", identity="i") == 3
            assert await w.pending() == ["b1", "a2", "b2"]
            # A mark that promises more than is left is no mark any more.
            assert (await w.first.witness()).marks.keys() == {"c"}

    async def test_the_first_worker_repairs(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            [row] = await w.write(outbox=[outbox("c1")])
            await w.first.published([row.seq])
            seen = await w.first.witness()
            everything = [Lost("", after=0, since=0)]
            await w.first.republish([], seen=seen, epoch="e1", identity="i1")
            with pytest.raises(Conflict):
                await w.second.republish(everything, seen=seen, epoch="e2", identity="i2")
            found = await w.second.witness()
            assert (found.epoch, found.identity) == ("e1", "i1")
            assert await w.pending() == []
            assert await w.second.republish(everything, seen=found, epoch="e2", identity="i2") == 1

    async def test_republished_rows_keep_their_place(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(outbox=[outbox("a1", "a"), outbox("a2", "a")])
            await w.first.published([row.seq for row in rows])
            seen = await w.first.witness()
            lost = [Lost("", after=0, since=LARGEST)]
            await w.first.republish(lost, seen=seen, epoch="e", identity="i")
            again = await w.write(outbox=[outbox("a3", "a")])
            assert [row.envelope.id for row in again] == ["a1", "a2", "a3"]
            assert again[:2] == rows
