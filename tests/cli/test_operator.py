"""`saga` on a real store."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sagacity.backends.sql import SqlStore
from sagacity.cli.exits import Exit
from sagacity.cli.operator import main
from sagacity.core.delivery import Envelope, encode_entry
from sagacity.core.instance import Instance, Ledger, Status
from sagacity.core.plan import DeadLetterRow, Plan, TransitionRow

Run = Callable[..., Result]


@pytest.fixture
def run(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``saga ARGUMENTS`` on the store."""
    monkeypatch.setenv("SAGACITY_STORE", sqlite_url)

    def invoke(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(main, arguments, **options)

    return invoke


@pytest.fixture
def filled(sqlite_url: str) -> str:
    """A store with three instances and two dead letters."""

    async def fill() -> None:
        store = SqlStore(sqlite_url)
        await store.prepare(create=True)
        now = store.clock.now()
        async with store.transaction() as transaction:
            await transaction.write(plan(now))
        await store.close()

    asyncio.run(fill())
    return sqlite_url


def plan(now: int) -> Plan:
    def instance(key: str, status: Status, state: str, age_s: int) -> Instance:
        return Instance(
            type="Order",
            key=key,
            uid=f"uid-{key}",
            version=1,
            status=status,
            state=state,
            schema_version=1,
            data=b'{"ref":"x"}',
            ledger=Ledger(steps=1),
            started_at=now - age_s * 1_000_000,
            updated_at=now - age_s * 1_000_000,
        )

    def letter(message_id: str, *, decoded: bool) -> DeadLetterRow:
        envelope = Envelope(id=message_id, type="payments.Charged", topic="payments")
        return DeadLetterRow(
            consumer="Order",
            message_id=message_id,
            topic="payments",
            message_type="payments.Charged",
            reason="failed" if decoded else "undecodable",
            error="Traceback\n  File ...\nValueError: no\x1b[2J",
            attempts=8,
            entry=encode_entry(envelope) if decoded else b"\x80",
            decoded=decoded,
            saga_type="Order",
            saga_key="o1",
            at=now,
        )

    step = TransitionRow(
        uid="uid-o1",
        version=1,
        saga_type="Order",
        saga_key="o1",
        at=now,
        message_id="m1",
        message_type="orders.Ordered",
        handler="begin",
        state_from="",
        state_to="charging",
        status="running",
        correlation_id="c1",
        effects=b"{}",
        entry=encode_entry(Envelope(id="m1", type="orders.Ordered", topic="orders")),
    )
    return Plan(
        now=now,
        saga_inserts=[
            instance("o1", Status.RUNNING, "charging", 30),
            instance("o2", Status.STUCK, "charging", 600),
            instance("o3", Status.COMPLETED, "paid", 5),
        ],
        transitions=[step],
        dead_letters=[letter("m8", decoded=False), letter("m9", decoded=True)],
    )


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.usefixtures("filled")
def test_the_one_that_stands_still_for_longest_is_listed_first(run: Run) -> None:
    result = run("list")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["SAGA", "KEY", "STATUS", "STATE", "STARTED", "LAST", "MOVED"]
    assert [line.split()[1] for line in lines[1:]] == ["o2", "o1", "o3"]
    assert "10 min ago" in lines[1]


@pytest.mark.usefixtures("filled")
def test_a_list_is_filtered_and_turned_page_by_page(run: Run) -> None:
    assert [s["saga_key"] for s in listed(run("list", "--status", "stuck", "--json"))] == ["o2"]
    assert [s["saga_key"] for s in listed(run("list", "--state", "paid", "--json"))] == ["o3"]
    assert listed(run("list", "--type", "Other", "--json")) == []
    assert "No saga instances." in run("list", "--type", "Other").output
    first = json.loads(run("list", "--limit", "2", "--json").output)
    rest = json.loads(run("list", "--after", first["next"], "--json").output)
    assert [s["saga_key"] for s in rest["sagas"]] == ["o3"]
    assert rest["next"] == ""


def listed(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    sagas: list[dict[str, Any]] = json.loads(result.output)["sagas"]
    return sagas


@pytest.mark.usefixtures("filled")
def test_show_tells_the_story(run: Run) -> None:
    result = run("show", "Order", "o1", "--service", "tests.cli.services:service")
    assert result.exit_code == 0, result.output
    assert "Order o1  RUNNING in charging" in result.output
    assert "2 of its messages are dead letters" in result.output
    assert "event    payments.Charged" in result.output
    assert "begins in charging" in result.output
    facts = json.loads(run("show", "Order", "o1", "--json").output)
    assert facts["about"]["state"] == "charging"
    assert facts["data"] == {"ref": "x"}
    assert len(facts["dead_letters"]) == 2


@pytest.mark.usefixtures("filled")
def test_why_tells_only_what_holds_it_up(run: Run) -> None:
    result = run("why", "Order", "o1")
    assert result.exit_code == 0, result.output
    assert "2 of its messages are dead letters" in result.output.splitlines()[0]
    assert "begins in" not in result.output


@pytest.mark.usefixtures("filled")
def test_show_of_an_unknown_instance_fails(run: Run) -> None:
    result = run("show", "Order", "o\x1b[2J9")
    assert result.exit_code == Exit.FAILED
    assert "There is no Order o\\x1b[2J9" in result.output
    result = run("show", "Ordre", "o1", "--service", "tests.cli.services:service")
    assert result.exit_code == Exit.WRONG
    assert "service shop has no saga 'Ordre': expected one of Order" in result.output


@pytest.mark.usefixtures("filled")
def test_counts_fail_where_an_operator_is_needed(run: Run) -> None:
    result = run("counts")
    assert result.exit_code == Exit.FAILED
    assert "sagas.stuck" in result.output
    found = json.loads(run("counts", "--json").output)
    assert (found["sagas.running"], found["sagas.stuck"], found["dead_letters"]) == (1, 1, 2)


def test_counts_of_a_store_where_all_is_well(run: Run) -> None:
    assert run("migrate").exit_code == 0
    assert run("counts").exit_code == 0


# ------------------------------------------------------------------------------------- dead letters


@pytest.mark.usefixtures("filled")
def test_dead_letters_are_listed_and_shown_escaped(run: Run) -> None:
    for arguments in (("dead-letters",), ("dead-letters", "list")):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "ValueError: no\\x1b[2J" in result.output
    letters = json.loads(run("dead-letters", "list", "--json").output)
    assert [letter["replayable"] for letter in letters] == [True, False]
    result = run("dead-letters", "show", str(letters[0]["id"]))
    assert "  ValueError: no\\x1b[2J" in result.output
    assert run("dead-letters", "show", "999").exit_code == Exit.FAILED
    assert json.loads(run("dead-letters", "list", "--consumer", "x", "--json").output) == []


@pytest.mark.usefixtures("filled")
def test_replaying_asks_first_and_tells_what_it_could_not_do(run: Run) -> None:
    result = run("dead-letters", "replay", "--all", "--dry-run")
    assert "0 replayed." in result.output
    assert "could not be decoded" in result.output
    result = run("dead-letters", "replay", "--all", input="n\n")
    assert result.exit_code == 1
    assert "Have 1 tried again?" in result.output
    assert json.loads(run("counts", "--json").output)["parked"] == 0
    result = run("dead-letters", "replay", "--all", input="y\n")
    assert "1 replayed." in result.output
    assert result.exit_code == Exit.FAILED, "one of them could not be replayed"
    found = json.loads(run("counts", "--json").output)
    assert (found["parked"], found["dead_letters"]) == (1, 1)


@pytest.mark.usefixtures("filled")
def test_chosen_dead_letters_are_replayed_without_asking(run: Run) -> None:
    letters = json.loads(run("dead-letters", "list", "--json").output)
    able = next(letter["id"] for letter in letters if letter["replayable"])
    result = run("dead-letters", "replay", str(able), "--yes")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "1 replayed.")
    result = run("dead-letters", "replay", str(able), "--yes")
    assert result.exit_code == Exit.FAILED
    assert f"#{able}  is not among" in result.output


@pytest.mark.parametrize("arguments", [(), ("7", "--all")])
def test_replaying_needs_ids_or_all(run: Run, arguments: tuple[str, ...]) -> None:
    result = run("dead-letters", "replay", *arguments)
    assert result.exit_code == 2
    assert "expected ids of dead letters or --all" in result.output


# --------------------------------------------------------------------------------------- migrations


def test_migrating_tells_what_it_would_do_and_did(run: Run) -> None:
    assert "Would create the tables of version" in run("migrate", "--dry-run").output
    assert "Created the tables of version" in run("migrate").output
    assert "already" in run("migrate").output
    facts = json.loads(run("migrate", "--json").output)
    assert facts["before"] == facts["after"]
    assert run("migrate", "--sql").output == "", "nothing is left to do"


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_the_sql_of_a_migration_needs_no_database(run: Run, dialect: str) -> None:
    result = run("migrate", "--sql", "--dialect", dialect)
    assert result.exit_code == 0
    assert "CREATE TABLE sagacity_saga" in result.output


def test_a_dialect_alone_and_memory_are_refused(run: Run) -> None:
    assert run("migrate", "--dialect", "sqlite").exit_code == Exit.WRONG
    assert run("migrate", "--store", "memory:").exit_code == Exit.WRONG


# ------------------------------------------------------------------------------------------ diagrams


def test_a_service_is_drawn(run: Run) -> None:
    result = run("diagram", "tests.cli.services:service")
    assert result.exit_code == 0, result.output
    assert "stateDiagram-v2" in result.output
    assert "charging" in result.output
    texts = json.loads(run("diagram", "tests.cli.services", "Order", "--json").output)
    assert list(texts) == ["Order"]
    assert run("diagram", "tests.cli.services", "Nobody").exit_code == Exit.WRONG


# --------------------------------------------------------------------------------------------- faults


def test_a_file_that_is_not_there_is_not_made(run: Run, tmp_path: Path) -> None:
    result = run("list")
    assert result.exit_code == Exit.WRONG
    assert "expected an SQLite file that exists" in result.output
    assert not list(tmp_path.iterdir())


def test_a_store_without_tables_is_told_apart(run: Run, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.execute("CREATE TABLE other (x)")
    result = run("counts")
    assert result.exit_code == Exit.SCHEMA
    assert "saga migrate" in result.output


def test_an_unreachable_store_is_one_line_without_its_secret(run: Run) -> None:
    result = run("counts", "--store", "postgresql+asyncpg://shop:hunter2@127.0.0.1:1/shop")
    assert result.exit_code == Exit.UNREACHABLE
    assert "shop:***@127.0.0.1" in result.output
    assert "hunter2" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_wrong_url_is_a_usage_error(run: Run) -> None:
    result = run("counts", "--store", "mysql://shop:hunter2@h/d")
    assert result.exit_code == Exit.WRONG
    assert "hunter2" not in result.output


@pytest.mark.usefixtures("filled")
def test_rich_draws_the_same_rows_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagacity.cli.output._rich_wanted", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    result = run("list")
    assert result.exit_code == 0, result.output
    assert all(key in result.output for key in ("o1", "o2", "o3"))
