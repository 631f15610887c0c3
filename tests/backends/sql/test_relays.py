"""Numbers are taken before commits are made: a lower one may appear after a higher one has left."""

from __future__ import annotations

import pytest

from sagacity.core.plan import Plan
from sagacity.testing.conformance.stores import LARGEST, message_ids, outbox, workers
from tests.backends.sql.test_store_postgres import PostgresDatabase

pytestmark = pytest.mark.asyncio


@pytest.mark.requirement("R36")
async def test_a_lower_number_that_commits_late_is_not_skipped(postgres_url: str) -> None:
    async with workers(PostgresDatabase(postgres_url)) as w:
        async with w.second.transaction() as slow:
            [late] = await slow.write(Plan(now=w.now, outbox=[outbox("late", "a")]))
            [early] = await w.write(outbox=[outbox("early", "b")])
            assert late.seq < early.seq
            # Two relays sweep while it is open: neither sees it, both see the other one.
            for relay in (w.first, w.second):
                assert message_ids(await relay.pending(LARGEST, 100)) == ["early"]
            await w.first.published([early.seq])
        for relay in (w.first, w.second):
            assert message_ids(await relay.pending(LARGEST, 100)) == ["late"]


@pytest.mark.requirement("R36")
async def test_two_relays_that_forget_the_same_rows_do_not_wait(postgres_url: str) -> None:
    async with workers(PostgresDatabase(postgres_url)) as w:
        rows = await w.write(outbox=[outbox(f"c{n}", "a") for n in range(5)])
        seqs = [row.seq for row in rows]
        async with w.second.transaction() as forgetting:
            await forgetting.write(Plan(now=w.now), seqs[:3])
            await w.first.published(seqs)  # would wait for the lock of the other otherwise
            assert await w.pending() == ["c0", "c1", "c2"]
        assert await w.pending() == []
