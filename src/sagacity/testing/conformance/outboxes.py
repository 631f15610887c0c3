"""The suite of `sagacity.ports.OutboxStore` and of what a plan does to the outbox."""

# ruff: noqa: D102 - the name of a test is its claim

from __future__ import annotations

import pytest

from sagacity.core.errors import Conflict
from sagacity.core.plan import OutboxRow, Plan
from sagacity.testing.conformance.stores import (
    LARGEST,
    SECOND,
    StoreDatabase,
    envelope,
    inbox,
    message_ids,
    outbox,
    workers,
)

__all__ = ["OutboxSuite"]


class OutboxSuite:
    """Nothing is published before its elders, and nothing is forgotten before it was published."""

    async def test_a_plan_returns_its_rows_in_order(self, database: StoreDatabase) -> None:
        odd = envelope(
            "c3",
            body=b"\x00\xff",
            version=7,
            time=LARGEST,
            source="shop",
            subject="Order/1",
            correlation_id="c",
            causation_id="m1",
            actor="ann",
            hops=3,
            saga_type="Order",
            saga_key="ключ",
            saga_uid="u",
            reply_to="replies",
            reply_topics=("a", "b"),
            in_reply_to="x",
            undoes="y",
            sequence=4,
            traceparent="00-a-b-01",
            tracestate="k=v",
        )
        async with workers(database) as w:
            rows = await w.write(
                outbox=[outbox("c2", "a"), outbox("c1", "a"), outbox("c4"), outbox("c0", "b")]
            )
            assert message_ids(rows) == ["c2", "c1", "c4", "c0"]
            assert [row.seq for row in rows] == sorted({row.seq for row in rows})
            assert [row.lane for row in rows] == ["a", "a", "", "b"]
            assert {row.created_at for row in rows} == {w.now}
            [row] = await w.write(outbox=[OutboxRow("c", odd)])
            assert row.envelope == odd
            assert (await w.second.pending(w.now, 10))[-1] == row

    async def test_a_lane_is_returned_from_its_first_pending_row(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(outbox=[outbox("a1", "a"), outbox("b1", "b"), outbox("x1")])
            async with w.second.transaction() as transaction:
                plan = Plan(now=w.now, outbox=[outbox("x2"), outbox("a2", "a")])
                rows = await transaction.write(plan)
            assert message_ids(rows) == ["a1", "x2", "a2"]
            first = rows[0]
            rows = await w.write(outbox=[outbox("a3", "a")], published=[first.seq])
            assert message_ids(rows) == ["a2", "a3"]
            rows = await w.write(outbox=[outbox("b2", "b")], published=[row.seq for row in rows])
            assert message_ids(rows) == ["b1", "b2"]
            assert await w.pending() == ["b1", "x1", "x2", "b2"]

    async def test_published_rows_are_forgotten_once(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(outbox=[outbox(f"c{n}", "a") for n in range(3)])
            seqs = [row.seq for row in rows]
            await w.first.published(seqs[:2])
            await w.second.published([*seqs[:2], 987_654_321])
            await w.write(published=[*seqs[:1], 987_654_321])
            await w.first.published([])
            assert await w.pending() == ["c2"]

    async def test_nothing_is_forgotten_by_a_plan_that_fails(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(outbox=[outbox("c1", "a")], inbox=[inbox()])
            with pytest.raises(Conflict):
                await w.write(inbox=[inbox()], published=[rows[0].seq])
            assert await w.pending() == ["c1"]

    async def test_numbers_grow_and_are_never_used_again(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            seen: list[int] = []
            for n in range(4):
                [row] = await w.write(outbox=[outbox(f"c{n}")])
                seen.append(row.seq)
                await w.first.published([row.seq])
            assert seen == sorted(set(seen))

    async def test_a_known_message_id_is_left_out(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(outbox=[outbox("c1", "a", body=b"[1]")])
            rows = await w.write(outbox=[outbox("c1", "a", body=b"[2]"), outbox("c2", "a")])
            assert [(row.envelope.id, row.envelope.body) for row in rows] == [
                ("c1", b"[1]"),
                ("c2", b"{}"),
            ]
            assert await w.write(outbox=[outbox("c3"), outbox("c3")])
            assert await w.pending() == ["c1", "c2", "c3"]

    async def test_a_message_that_left_does_not_come_back(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            [row] = await w.write(outbox=[outbox("c1", "a")])
            await w.first.published([row.seq])
            assert await w.write(outbox=[outbox("c1", "a")]) == []
            assert await w.first.append([outbox("c1")]) == []
            assert await w.pending() == []

    async def test_appending_without_a_plan(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(outbox=[outbox("a1", "a")])
            rows = await w.second.append([outbox("a2", "a"), outbox("x1"), outbox("a1", "a")])
            assert message_ids(rows) == ["a1", "a2", "x1"]
            assert await w.pending() == ["a1", "a2", "x1"]
            assert await w.first.append([]) == []

    # ----------------------------------------------------------------------------------- sweeping

    async def test_only_lanes_that_wait_too_long_are_swept(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            start = w.now
            await w.write(outbox=[outbox("a1", "a"), outbox("x1")])
            w.clock.advance(1)
            await w.write(outbox=[outbox("b1", "b"), outbox("a2", "a"), outbox("x2")])
            assert message_ids(await w.first.pending(start, 10)) == ["a1", "x1", "a2"]
            assert await w.first.pending(start - 1, 10) == []
            everything = await w.second.pending(start + SECOND, 10)
            assert message_ids(everything) == ["a1", "x1", "b1", "a2", "x2"]

    async def test_a_limit_never_cuts_a_lane_at_its_head(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            rows = await w.write(
                outbox=[
                    outbox(f"{lane or 'x'}{n}", lane) for n in range(4) for lane in ("a", "b", "")
                ]
            )
            whole = message_ids(rows)
            for limit in range(1, len(whole) + 1):
                found = message_ids(await w.first.pending(w.now, limit))
                assert 0 < len(found) <= limit
                for name in "abx":
                    of_lane = [id_ for id_ in found if id_.startswith(name)]
                    assert of_lane == [f"{name}{n}" for n in range(len(of_lane))]
            assert message_ids(await w.first.pending(w.now, 100)) == whole

    async def test_an_old_row_behind_a_young_head_brings_the_whole_lane(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            w.clock.advance(100)
            await w.write(outbox=[outbox("a1", "a")])
            w.clock.set(w.now - 50 * SECOND)  # the clock of the store was corrected
            await w.write(outbox=[outbox("a2", "a")])
            assert message_ids(await w.first.pending(w.now, 10)) == ["a1", "a2"]
