"""`check` sees each invariant broken; `status`, `load` and `confirm` on a running program."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

from examples.batch_import.checking import check_all
from examples.batch_import.cli import main
from examples.batch_import.messages import ConfirmEmail
from examples.batch_import.place import Place
from examples.batch_import.program import Program, sqlite_stores
from examples.batch_import.reading import reading
from examples.batch_import.sending import send
from sagacity.backends.sql.tables import outbox
from sagacity.core.instance import Ledger, encode_ledger
from tests.examples.batch_import import documents
from tests.examples.batch_import.scene import Scene


@pytest.fixture(scope="module")
def service_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SQLite only: these tests break copies of the files. The outcomes run `check` on both."""
    return sqlite_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def scene(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A user whose orders are ready and failed, and one who has not confirmed."""
    scene = Scene(program, tmp_path_factory.mktemp("scene"))
    program.set_faults(
        "shipping", {"action": "refuse", "on": "create", "match": {"user": scene.ref("bob")}}
    )
    systems = ("billing", "loyalty", "shipping")
    bad = documents.order(scene.ref("bad"), user_ref=scene.ref("ada"), total="1.00")
    batch = scene.hand_in(
        users=[scene.user("ada"), scene.user("bob"), scene.user("eve")],
        orders=[
            scene.order("good", "ada", *systems),
            scene.order("refused", "bob", *systems),
            scene.order("waits", "eve", "billing"),
            bad,
        ],
    )
    program.wait_until_quiet(60)
    scene.confirm("ada")
    scene.confirm("bob")
    program.set_faults("shipping")
    report = program.report(batch)
    assert report is not None
    assert (report.applied, report.quarantined) == (6, 1)
    assert scene.order_states("good", "refused", "waits") == ["ready", "failed", "waiting"]
    return scene


class Copy:
    """A copy of everything that `check` reads, to be broken."""

    def __init__(self, place: Place, directory: Path) -> None:
        def copied(path: str) -> str:
            target = directory / Path(path).name
            with (
                closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as old,
                closing(sqlite3.connect(target)) as new,
            ):
                old.backup(new)
            return str(target)

        prefix = "sqlite+aiosqlite:///"
        self._files = {name: copied(url.removeprefix(prefix)) for name, url in place.stores.items()}
        ledgers = {name: copied(path) for name, path in place.ledgers.items()}
        self.place = msgspec.structs.replace(
            place,
            stores={name: prefix + path for name, path in self._files.items()},
            ledgers=ledgers,
            mails=copied(place.mails),
        )
        self._files |= {**ledgers, "mails": self.place.mails}

    def change(self, name: str, *statements: str, **values: object) -> None:
        """Run statements on a file; each must change something."""
        with closing(sqlite3.connect(self._files[name], isolation_level=None)) as db:
            for statement in statements:
                changed = db.execute(statement, values).rowcount
                assert changed != 0, statement

    def rows(self, name: str, statement: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self._files[name])) as db:
            return db.execute(statement).fetchall()

    def broken(self) -> dict[str, str]:
        """Invariant -> what contradicts it."""
        verdicts = asyncio.run(check_all(self.place.evidence))
        assert [verdict.name for verdict in verdicts] == [f"I{n}" for n in range(1, 15)]
        return {v.name: "\n".join(v.wrong) for v in verdicts if not v.holds}


@pytest.fixture
def copy(scene: Scene, tmp_path: Path) -> Copy:
    copy = Copy(scene.program.place, tmp_path)
    assert copy.broken() == {}
    return copy


def test_account_of_somebody_who_never_confirmed(copy: Copy) -> None:
    copy.change("authentication", "UPDATE authentication_optin SET confirmed_at = NULL")
    assert "who never confirmed" in copy.broken()["I1"]


def test_account_made_before_its_user_confirmed(copy: Copy) -> None:
    later = "UPDATE authentication_optin SET confirmed_at = confirmed_at + 3600000000"
    copy.change("authentication", later + " WHERE confirmed_at IS NOT NULL")
    assert list(copy.broken()) == ["I1"]
    assert "too early" in copy.broken()["I1"]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM mail WHERE seq = 1", "nobody has received it"),
        (
            (
                "INSERT INTO mail SELECT 99, at_us, sender, recipients, message_id, raw || 'x'"
                " FROM mail WHERE seq = 1"
            ),
            "2 different contents",
        ),
        ("UPDATE mail SET message_id = '<other@x>' WHERE seq = 1", "belongs to no opt-in cycle"),
        ("UPDATE mail SET recipients = '[\"eve@evil.test\"]' WHERE seq = 1", "instead of"),
    ],
)
def test_mail_that_no_cycle_explains(copy: Copy, statement: str, expected: str) -> None:
    copy.change("mails", statement)
    assert list(copy.broken()) == ["I2"]
    assert expected in copy.broken()["I2"]


def test_the_same_mail_twice_is_the_same_mail(copy: Copy) -> None:
    again = "INSERT INTO mail SELECT 99, at_us, sender, recipients, message_id, raw FROM mail"
    copy.change("mails", again + " WHERE seq = 1")
    assert copy.broken() == {}


def test_second_account_of_a_user_in_a_system(copy: Copy, scene: Scene) -> None:
    copy.change(
        "billing",
        "INSERT INTO ledger SELECT 99, at_us, operation, 'second', external_ref, plan, key"
        " FROM ledger WHERE external_ref = :user AND operation = 'create'",
        user=scene.ref("ada"),
    )
    assert "2 live accounts" in copy.broken()["I3"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts_remote_account SET remote_id = 'other' WHERE state = 'active'",
        "DELETE FROM accounts_remote_account WHERE state = 'active'",
    ],
)
def test_account_that_is_not_the_one_on_record(copy: Copy, statement: str) -> None:
    copy.change("accounts", statement)
    assert list(copy.broken()) == ["I3"]
    assert "on record" in copy.broken()["I3"]


def test_account_on_record_that_the_system_does_not_have(copy: Copy, scene: Scene) -> None:
    copy.change(
        "billing",
        "INSERT INTO ledger SELECT 99, at_us, 'delete', account, external_ref, plan, key"
        " FROM ledger WHERE external_ref = :user AND operation = 'create'",
        user=scene.ref("ada"),
    )
    assert "does not have it" in copy.broken()["I3"]


@pytest.mark.parametrize(
    ("service", "statement", "expected"),
    [
        (
            "accounts",
            "UPDATE accounts_requirement SET state = 'active' WHERE order_ref = :refused",
            "is failed and holds",
        ),
        (
            "accounts",
            (
                "UPDATE accounts_requirement SET state = 'refused'"
                " WHERE order_ref = :good AND system = 'loyalty'"
            ),
            "is ready and needs",
        ),
        (
            "importing",
            "UPDATE importing_order SET accounts_state = 'waiting' WHERE ref = :good",
            "still waits",
        ),
        (
            "importing",
            "UPDATE importing_order SET accounts_state = 'none' WHERE ref = :good",
            "asked for none",
        ),
    ],
)
def test_order_that_does_not_hold_what_it_says(
    copy: Copy, scene: Scene, service: str, statement: str, expected: str
) -> None:
    refs = {"good": scene.ref("good"), "refused": scene.ref("refused")}
    copy.change(service, statement, **{n: ref for n, ref in refs.items() if f":{n}" in statement})
    assert expected in copy.broken()["I4"]


def test_account_that_no_order_holds(copy: Copy, scene: Scene) -> None:
    copy.change(
        "accounts",
        "UPDATE accounts_requirement SET state = 'released' WHERE order_ref = :good",
        good=scene.ref("good"),
    )
    assert "which no order holds" in copy.broken()["I5"]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE importing_record SET state = 'staged' WHERE seq = 1", "reports"),
        ("UPDATE importing_record SET state = 'stale' WHERE seq = 1", "reports"),
        ("UPDATE importing_batch SET applied = applied + 1", "reports"),
        ("UPDATE importing_batch SET records = records + 1", "reports"),
        ("DELETE FROM importing_error", "does not say what is wrong"),
        ("DELETE FROM importing_batch", "is not known"),
        ("UPDATE importing_batch SET state = 'rejected'", "has left records"),
    ],
)
def test_record_that_is_not_accounted_for(copy: Copy, statement: str, expected: str) -> None:
    copy.change("importing", statement)
    assert expected in copy.broken()["I6"]


@pytest.mark.parametrize(
    "change",
    [
        "importing_user SET name = 'somebody'",
        "importing_user SET email = 'other@test.test'",
        "importing_user SET phone = '0'",
        "importing_order SET status = 'shipped'",
        "importing_order SET currency = 'USD'",
        "importing_order SET total = '4'",
    ],
)
def test_column_with_a_value_that_nobody_told(copy: Copy, change: str) -> None:
    copy.change("importing", f"UPDATE {change}")
    assert "which no source that may change it has told" in copy.broken()["I7"]


def test_value_that_only_a_source_without_the_right_told(copy: Copy) -> None:
    copy.change("importing", "UPDATE importing_batch SET source = 'logistics'")
    broken = copy.broken()["I7"]
    assert "has name" in broken
    assert "has status" not in broken  # logistics may tell that


def test_message_that_does_not_leave(copy: Copy) -> None:
    copy.change(
        "accounts", "INSERT INTO sagacity_outbox_pending (seq, lane, created_at) VALUES (1, x'', 1)"
    )
    assert list(copy.broken()) == ["I8"]


def test_saga_that_waits_for_nothing(copy: Copy) -> None:
    copy.change(
        "accounts",
        "UPDATE sagacity_saga SET ledger = :ledger WHERE state = 'waiting'",
        ledger=encode_ledger(Ledger()),
    )
    assert "waits for nothing" in copy.broken()["I9"]


@pytest.mark.parametrize("service", ["importing", "authentication", "accounts"])
def test_message_that_follows_from_nothing(copy: Copy, service: str) -> None:
    [(seq, headers)] = copy.rows(
        service, "SELECT seq, headers FROM sagacity_outbox ORDER BY seq DESC LIMIT 1"
    )
    assert isinstance(headers, bytes)
    header = msgspec.json.decode(headers)
    header["correlation_id"] = "nothing"
    copy.change(
        service,
        "UPDATE sagacity_outbox SET headers = :headers WHERE seq = :seq",
        headers=msgspec.json.encode(header),
        seq=seq,
    )
    assert list(copy.broken()) == ["I10"]


@pytest.mark.requirement("R39")
@pytest.mark.parametrize(
    "change",
    [
        "sagacity_saga SET state = 'expired' WHERE state = 'mailed'",
        "sagacity_saga SET data = replace(CAST(data AS TEXT), '\"cycle\":1', '\"cycle\":2')",
        (
            "sagacity_transition SET state_to = state_to, entry = (SELECT entry FROM"
            " sagacity_transition ORDER BY seq LIMIT 1)"
        ),
    ],
)
def test_saga_that_its_history_does_not_lead_to(copy: Copy, change: str) -> None:
    copy.change("authentication", f"UPDATE {change}")
    assert "OptInSaga" in copy.broken()["I11"]


def test_table_of_another_context(copy: Copy) -> None:
    copy.change("accounts", "CREATE TABLE importing_order (ref TEXT)")
    assert list(copy.broken()) == ["I12"]


def test_message_that_counted_twice(copy: Copy) -> None:
    copy.change(
        "accounts",
        "CREATE TABLE kept AS SELECT * FROM sagacity_inbox",
        "DROP TABLE sagacity_inbox",
        "ALTER TABLE kept RENAME TO sagacity_inbox",
        "INSERT INTO sagacity_inbox SELECT * FROM sagacity_inbox LIMIT 1",
    )
    assert list(copy.broken()) == ["I13"]


def test_undone_in_the_order_in_which_it_was_done(copy: Copy) -> None:
    undos = [
        seq
        for seq, headers in copy.rows("accounts", "SELECT seq, headers FROM sagacity_outbox")
        if isinstance(headers, bytes) and msgspec.json.decode(headers).get("undoes")
    ]
    assert len(undos) == 2
    first, second = undos
    move = "UPDATE sagacity_outbox SET seq = {} WHERE seq = {}"
    copy.change(
        "accounts", move.format(-1, first), move.format(first, second), move.format(second, -1)
    )
    assert list(copy.broken()) == ["I14"]
    assert "before the later" in copy.broken()["I14"]


# --- the command line --------------------------------------------------------------------------


@pytest.fixture
def type_in(scene: Scene, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """Runs a command line on the running program."""
    scene.program.place.write(tmp_path)

    def run(*arguments: str, at: Path = tmp_path) -> Result:
        return CliRunner().invoke(main, [*arguments, "--at", str(at)])

    yield run
    scene.program.wait_until_quiet(60)
    assert [v for v in scene.program.check() if not v.holds] == []


def test_check_exits_with_0_only_if_all_invariants_hold(
    type_in: Callable[..., Result], copy: Copy, tmp_path: Path
) -> None:
    good = type_in("check")
    assert good.exit_code == 0, good.output
    assert good.output.count("holds") >= 14

    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    copy.change("importing", "UPDATE importing_user SET name = 'somebody'")
    copy.place.write(elsewhere)
    bad = type_in("check", at=elsewhere)
    assert bad.exit_code == 1
    assert "BROKEN" in bad.output
    assert "somebody" in bad.output


def test_a_place_without_a_program_is_told_in_one_line(
    type_in: Callable[..., Result], tmp_path: Path
) -> None:
    told = type_in("check", at=tmp_path / "nowhere")
    assert told.exit_code == 1
    assert "no program was started in" in told.output


@pytest.mark.requirement("R24")
def test_status_tells_what_is_open_until_all_has_converged(
    scene: Scene, type_in: Callable[..., Result]
) -> None:
    program = scene.program
    batch = scene.hand_in(users=[scene.user("zoe")], orders=[scene.order("zoes", "zoe", "billing")])
    program.wait_until_quiet(60)

    found = program.convergence(batch)
    assert found is not None
    assert not found.converged
    assert {(one.service, one.what, one.waits) for one in found.open} == {
        ("authentication", "OptInSaga mailed", True),
        ("accounts", "AccountSaga waiting", True),
    }
    told = type_in("status", batch)
    assert told.exit_code == 0
    assert "Not converged yet" in told.output
    assert "AccountSaga waiting" in told.output

    program.stop_workers("accounts")
    program.follow(program.link(scene.email("zoe")))
    found = program.convergence(batch)
    assert found is not None
    assert not found.converged
    program.restart("accounts")
    program.wait_until_quiet(60)

    found = program.convergence(batch)
    assert found is not None
    assert found.converged, found.open
    assert "Converged" in type_in("status", batch).output
    assert type_in("status", "unheard-of").exit_code == 1


def test_load_waits_for_the_report_of_this_file(
    scene: Scene, type_in: Callable[..., Result], tmp_path: Path
) -> None:
    root = documents.ROOT.replace("b-1", scene.ref("typed"))
    file = tmp_path / "typed.xml"
    file.write_bytes(documents.document(documents.users(scene.user("typed")), root=root))

    told = type_in("load", str(file), "--wait")
    assert told.exit_code == 0, told.output
    assert "1: 1 applied, 0 stale, 0 in quarantine" in told.output
    assert type_in("load", str(file), "--wait").exit_code == 0

    file.write_bytes(documents.document(documents.users(scene.user("other")), root=root))
    scene.program.wait_until_quiet(60)
    told = type_in("load", str(file), "--wait")
    assert told.exit_code == 1
    assert "This file was refused" in told.output


@pytest.mark.requirement("R60")
def test_a_confirmation_by_command_line_page_or_message_causes_the_same(
    scene: Scene, type_in: Callable[..., Result]
) -> None:
    program = scene.program
    names = ("by-command-line", "by-page", "by-message")
    scene.load(
        users=[scene.user(name) for name in names],
        orders=[scene.order(f"of-{name}", name, "billing") for name in names],
    )
    links = {name: program.link(scene.email(name)) for name in names}

    assert type_in("confirm", links["by-command-line"]).exit_code == 0
    assert program.follow(links["by-page"]).is_success
    by_message = ConfirmEmail(links["by-message"].rpartition("/")[2])
    # As a worker of another service sends it: by the outbox of its own database.
    asyncio.run(send(by_message, store=program.stores["accounts"], source="accounts"))
    program.wait_until_quiet(60)

    assert scene.order_states(*(f"of-{name}" for name in names)) == ["ready"] * 3
    caused = [_caused_by_confirming(program, links[name]) for name in names]
    assert caused[0] == caused[1] == caused[2]
    assert "EmailConfirmed" in caused[0]


def _caused_by_confirming(program: Program, link: str) -> list[str]:
    """The types of all messages that follow from the ConfirmEmail with the token of a link."""
    token = link.rpartition("/")[2]
    envelopes = [
        envelope
        for service in program.services
        for envelope in asyncio.run(_sent(program.stores[service]))
    ]
    [root] = [e for e in envelopes if e["type"].endswith(".ConfirmEmail") and token in e["body"]]
    return sorted(
        envelope["type"].rpartition(".")[2]
        for envelope in envelopes
        if envelope["correlation_id"] == root["id"]
    )


async def _sent(store: str) -> list[dict[str, Any]]:
    async with reading(store) as connection:
        rows = await connection.execute(select(outbox.c.headers, outbox.c.body))
        return [{**msgspec.json.decode(row.headers), "body": row.body.decode()} for row in rows]
