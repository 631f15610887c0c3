"""A test of the example that fails because something does not come to rest says what was going on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import text

from examples.batch_import.generate import Plan, generate
from examples.batch_import.program import Program
from examples.batch_import.quiet import StillMoving
from sagacity.backends.sql import SqlStore

PROGRAM_SERVICES = ("importing",)


def test_what_does_not_come_to_rest_tells_of_its_workers_and_databases(
    program: Program, batch_file: Path
) -> None:
    generate(batch_file, Plan(batch_id="left", users=2, orders=2))
    program.stop_workers("importing")
    program.load(batch_file)
    note = asyncio.run(_note_while_somebody_holds_a_table(program))
    assert "--- the end of importing.log" in note
    assert "Worker joined its group" in note
    assert "--- importing: pending\nrows=" in note
    if program.stores["importing"].startswith("postgresql"):
        assert "state=idle in transaction" in note
        assert "query=LOCK TABLE sagacity_parked" in note
        assert "relname=sagacity_outbox_pending" in note
    program.restart("importing")
    program.wait_until_quiet()


async def _note_while_somebody_holds_a_table(program: Program) -> str:
    store = SqlStore(program.stores["importing"])
    try:
        async with store.engine.connect() as connection:
            if store.engine.dialect.name == "postgresql":
                await connection.execute(text("LOCK TABLE sagacity_parked IN SHARE MODE"))
            with pytest.raises(StillMoving) as caught:
                await asyncio.to_thread(program.wait_until_quiet, 0.2)
    finally:
        await store.close()
    [note] = caught.value.__notes__
    return str(note)
