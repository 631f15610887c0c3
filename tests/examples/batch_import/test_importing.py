"""The importing service alone, as a process, with real Redis: nobody listens to what it says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import redis
from sqlalchemy import Select, select

from examples.batch_import.batch_file import RefusedRecord, read_batch
from examples.batch_import.generate import FILE_FAULTS, SIZES, Plan, generate
from examples.batch_import.importing.service import service
from examples.batch_import.importing.tables import Batch, Order, User
from examples.batch_import.loading import submit
from examples.batch_import.messages import BatchReceived, ChunkApplied, OrderImported, UserImported
from examples.batch_import.program import Program
from examples.batch_import.reading import reading
from examples.batch_import.status import BatchReport
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.tables import outbox
from sagacity.worker.opening import open_bus
from tests.examples.batch_import import documents
from tests.waiting import eventually

PROGRAM_SERVICES = ("importing",)
EARLIER, LATER = "2026-01-10T12:00:00Z", "2026-01-20T12:00:00Z"
_thousands = itertools.count(1)


class Desk:
    """One test's part of the program: batches, users and orders that no other test uses."""

    def __init__(self, program: Program, directory: Path) -> None:
        self.program = program
        self.mark = uuid4().hex[:6]
        self._directory = directory

    def ref(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def mail(self, name: str) -> str:
        return f"{name}@{self.mark}.test"

    def user(self, name: str, /, **told: str) -> str:
        told.setdefault("email", self.mail(name))
        return documents.user(self.ref(name), **told)

    def order(self, name: str, user: str, /, *systems: str, **told: str) -> str:
        accounts = "".join(f'<system code="{system}"/>' for system in systems)
        return documents.order(self.ref(name), user_ref=self.ref(user), accounts=accounts, **told)

    def file(
        self,
        name: str,
        *,
        users: list[str] | None = None,
        orders: list[str] | None = None,
        source: str = "crm",
    ) -> Path:
        """Write a batch whose id is `ref(name)`."""
        root = documents.ROOT.replace("b-1", self.ref(name)).replace("crm", source)
        inside = documents.users(*users or []) + documents.orders(*orders or [])
        path = self._directory / f"{name}-{uuid4().hex[:6]}.xml"
        path.write_bytes(documents.document(inside, root=root))
        return path

    def generated(self, name: str, plan: dict[str, Any]) -> Path:
        path = self._directory / f"{name}.xml"
        first = next(_thousands) * 1_000  # refs of its own
        numbered = {"first_user": first, "first_order": first * 10, **plan}
        generate(path, Plan(batch_id=self.ref(name), **numbered))
        return path

    def load(self, file: Path) -> None:
        self.program.load(file)
        self.program.wait_until_quiet(60)

    def imported(self, name: str, file: Path | None = None, **content: Any) -> BatchReport:
        self.load(file or self.file(name, **content))
        report = self.report(name)
        assert report.state == "imported", report
        return report

    def report(self, name: str) -> BatchReport:
        report = self.program.report(self.ref(name))
        assert report is not None
        return report

    def users(self) -> dict[str, dict[str, Any]]:
        return self._mine("user")

    def orders(self) -> dict[str, dict[str, Any]]:
        return self._mine("order")

    def _mine(self, table: str) -> dict[str, dict[str, Any]]:
        start = f"{self.mark}-"
        rows = self.program.rows("importing", table)
        return {row["ref"].removeprefix(start): row for row in rows if row["ref"].startswith(start)}

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """(type without its topic, body) of all messages that name something of this test, in order."""

        async def read() -> list[tuple[str, dict[str, Any]]]:
            async with reading(self.program.stores["importing"]) as connection:
                rows = await connection.execute(
                    select(outbox.c.message_type, outbox.c.body).order_by(outbox.c.seq)
                )
                return [
                    (row.message_type.rpartition(".")[2], json.loads(row.body))
                    for row in rows
                    if self.mark.encode() in row.body
                ]

        return asyncio.run(read())

    def said(self, *types: str) -> list[tuple[str, str]]:
        """(type, ref) of the events of these types, without what happened to batches."""
        return [
            (name, body.get("order_ref", body.get("user_ref", "")).removeprefix(f"{self.mark}-"))
            for name, body in self.events()
            if (name in types if types else "batch_id" not in body)
        ]


@pytest.fixture
def desk(program: Program, tmp_path: Path) -> Iterator[Desk]:
    yield Desk(program, tmp_path)
    assert [verdict for verdict in program.check() if not verdict.holds] == []
    assert program.held_up() == []


# --- what a batch becomes ----------------------------------------------------------------------


def test_every_record_of_a_small_file_is_settled(desk: Desk) -> None:
    users, orders = SIZES["S"]
    faults = {"bad-email": 1, "total-mismatch": 1, "unknown-user": 1, "shared-address": 1}
    file = desk.generated("s", {"users": users, "orders": orders, "faults": faults})

    report = desk.imported("s", file)

    assert (report.records, report.applied, report.quarantined) == (30, 26, 4)
    assert Counter(error.fault for error in report.errors) == {
        "bad-email": 1,
        "total-mismatch": 1,
        "unknown-user": 1,
        "address-taken": 1,
    }
    assert (report.chunks, report.chunks_applied) == (1, 1)


def test_an_empty_batch_imports_nothing_successfully(desk: Desk) -> None:
    report = desk.imported("empty")
    assert (report.records, report.chunks, report.applied) == (0, 0, 0)


def test_orders_keep_their_lines_and_exact_amounts(desk: Desk) -> None:
    lines = '<line sku="pen" qty="3" price="0.333333"/><line sku="cap" qty="1" price="9.000001"/>'
    desk.imported(
        "b", users=[desk.user("ada")], orders=[desk.order("o", "ada", total="10.00", lines=lines)]
    )

    assert str(desk.orders()["o"]["total"]) == "10"
    stored = desk.program.rows("importing", "order_line", order_ref=desk.ref("o"))
    assert [(line["sku"], line["qty"], str(line["price"])) for line in stored] == [
        ("pen", 3, "0.333333"),
        ("cap", 1, "9.000001"),
    ]


def test_a_later_file_replaces_lines_and_amounts(desk: Desk) -> None:
    desk.imported(
        "b1",
        users=[desk.user("ada")],
        orders=[desk.order("o", "ada", updated=EARLIER), desk.order("same", "ada")],
    )
    lines = '<line sku="ink" qty="1" price="5"/>'
    desk.imported("b2", orders=[desk.order("o", "ada", updated=LATER, total="5.00", lines=lines)])

    assert str(desk.orders()["o"]["total"]) == "5"
    stored = desk.program.rows("importing", "order_line", order_ref=desk.ref("o"))
    assert [line["sku"] for line in stored] == ["ink"]
    assert len(desk.program.rows("importing", "order_line", order_ref=desk.ref("same"))) == 1


# --- the same file again -----------------------------------------------------------------------


@pytest.mark.outcome("O4")
def test_the_same_file_again_changes_nothing(desk: Desk) -> None:
    file = desk.generated("twice", {"users": 10, "orders": 20, "faults": {"bad-email": 1}})
    first = desk.imported("twice", file)
    before = (desk.program.rows("importing", "user"), desk.program.rows("importing", "order"))
    events = desk.events()

    again = desk.imported("twice", file)

    assert again == first
    after = (desk.program.rows("importing", "user"), desk.program.rows("importing", "order"))
    assert after == before
    assert [name for name, _ in desk.events()[len(events) :]] == ["ReceiveBatch"]


@pytest.mark.outcome("O4")
def test_the_same_file_loaded_four_times_at_once_is_one_import(desk: Desk) -> None:
    file = desk.generated("at-once", {"users": 10, "orders": 20})
    program = desk.program

    async def at_once() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(
                    submit(
                        file,
                        store=program.stores["importing"],
                        bus=program.bus,
                        prefix=program.prefix,
                    )
                )

    asyncio.run(at_once())
    program.wait_until_quiet(60)

    report = desk.report("at-once")
    assert (report.state, report.applied, report.stale) == ("imported", 30, 0)
    names = Counter(name for name, _ in desk.events())
    assert names["ReceiveBatch"] == 4
    assert names["BatchReceived"] == names["BatchImported"] == 1


@pytest.mark.outcome("O4", "O22")
def test_another_content_under_the_same_id_is_rejected(desk: Desk) -> None:
    first = desk.imported("b", users=[desk.user("ada", updated=EARLIER)])

    desk.load(desk.file("b", users=[desk.user("ada", updated=LATER, name="Somebody else")]))

    assert desk.report("b") == first
    assert desk.users()["ada"]["name"] == "Ada"
    [(_, rejected)] = [event for event in desk.events() if event[0] == "BatchRejected"]
    assert "handed in before with other content" in rejected["reason"]


# --- stale records -----------------------------------------------------------------------------


@pytest.mark.outcome("O5")
def test_a_record_older_than_the_stored_one_changes_nothing(desk: Desk) -> None:
    desk.imported(
        "b1",
        users=[desk.user("ada", updated=LATER, name="Ada")],
        orders=[desk.order("o", "ada", updated=LATER, status="paid")],
    )
    before = (desk.users(), desk.orders())
    events = desk.said()

    report = desk.imported(
        "b2",
        users=[desk.user("ada", updated=EARLIER, name="Older", email=desk.mail("older"))],
        orders=[desk.order("o", "ada", updated=EARLIER, status="cancelled")],
    )

    assert (report.applied, report.stale, report.quarantined) == (0, 2, 0)
    assert (desk.users(), desk.orders()) == before
    assert desk.said() == events


def test_a_record_as_old_as_the_stored_one_is_applied(desk: Desk) -> None:
    desk.imported("b1", users=[desk.user("ada", updated=LATER, name="Ada")])
    report = desk.imported("b2", users=[desk.user("ada", updated=LATER, name="Ada L.")])
    assert (report.applied, report.stale) == (1, 0)
    assert desk.users()["ada"]["name"] == "Ada L."


# --- files that are refused as a whole ---------------------------------------------------------


@pytest.mark.outcome("O22")
@pytest.mark.parametrize("fault", sorted(FILE_FAULTS))
def test_a_file_that_is_no_good_changes_nothing(desk: Desk, fault: str) -> None:
    file = desk.generated("bad", {"users": 600, "orders": 5, "faults": {fault: 1}})
    tables = ("user", "order", "order_line", "record", "error")
    before = {table: desk.program.rows("importing", table) for table in tables}

    batch_id = desk.program.load(file).batch_id
    desk.program.wait_until_quiet(60)

    report = desk.program.report(batch_id)
    assert report is not None
    assert report.state == "rejected"
    assert report.reason
    assert {table: desk.program.rows("importing", table) for table in tables} == before
    rejected = _events_of_batch(desk.program, batch_id)
    assert rejected[-1] == "BatchRejected"
    assert "BatchStaged" not in rejected
    assert "UserImported" not in rejected


@pytest.mark.outcome("O22")
def test_a_file_may_end_at_any_byte(desk: Desk, tmp_path: Path) -> None:
    whole = desk.file("cut", users=[desk.user("ada")]).read_bytes()
    end = whole.rindex(b">")
    for number, length in enumerate({0, 1, 40, end // 2, end - 1, end}):
        file = tmp_path / f"cut-{number}.xml"
        file.write_bytes(whole[:length])
        batch_id = desk.program.load(file).batch_id
        desk.program.wait_until_quiet()
        report = desk.program.report(batch_id)
        assert report is not None
        assert report.state == "rejected", length
    assert desk.users() == {}


def test_a_rejected_file_may_come_again_repaired(desk: Desk) -> None:
    good = desk.file("b", users=[desk.user("ada")])
    broken = good.with_name("broken.xml")
    broken.write_bytes(good.read_bytes().replace(b"</batch>", b""))
    desk.load(broken)
    assert desk.report("b").state == "rejected"

    assert desk.imported("b", good).applied == 1
    assert list(desk.users()) == ["ada"]


def test_a_file_that_changed_or_went_after_it_was_handed_in_is_rejected(desk: Desk) -> None:
    desk.program.stop_workers("importing")
    changed = desk.file("changed", users=[desk.user("ada")])
    gone = desk.file("gone", users=[desk.user("bob")])
    desk.program.load(changed)
    desk.program.load(gone)
    changed.write_bytes(changed.read_bytes().replace(b"Ada", b"Eve"))
    gone.unlink()
    desk.program.restart("importing")
    desk.program.wait_until_quiet()

    assert "has changed" in desk.report("changed").reason
    assert "cannot be read" in desk.report("gone").reason
    assert desk.users() == {}


def _events_of_batch(program: Program, batch_id: str) -> list[str]:
    async def read() -> list[str]:
        async with reading(program.stores["importing"]) as connection:
            rows = await connection.execute(
                select(outbox.c.message_type, outbox.c.body).order_by(outbox.c.seq)
            )
            names = [row.message_type for row in rows if f'"{batch_id}"'.encode() in row.body]
            return [name.rpartition(".")[2] for name in names if "CommandFailed" not in name]

    return asyncio.run(read())


# --- records in quarantine ---------------------------------------------------------------------


@pytest.mark.outcome("O23")
def test_one_bad_record_in_a_thousand_is_in_quarantine_with_line_and_reason(desk: Desk) -> None:
    file = desk.generated("thousand", {"users": 200, "orders": 800, "faults": {"bad-qty": 1}})
    [struck] = [item for item in read_batch(file) if isinstance(item, RefusedRecord)]

    report = desk.imported("thousand", file)

    assert (report.records, report.applied, report.quarantined) == (1_000, 999, 1)
    [error] = report.errors
    assert (error.line, error.kind, error.fault) == (struck.line, "order", "bad-qty")
    assert "qty" in error.reason
    [(_, told)] = [event for event in desk.events() if event[0] == "RecordRefused"]
    assert (told["line"], told["reason"]) == (error.line, error.reason)


def test_an_address_belongs_to_one_user_whatever_its_case(desk: Desk) -> None:
    desk.imported("b1", users=[desk.user("ada", updated=EARLIER)])
    report = desk.imported(
        "b2",
        users=[
            desk.user("bob", email=desk.mail("ada").upper()),
            desk.user("eve", email=desk.mail("eve")),
        ],
    )
    assert [error.fault for error in report.errors] == ["address-taken"]
    assert set(desk.users()) == {"ada", "eve"}


def test_an_address_that_is_given_up_may_be_taken_in_the_same_file(desk: Desk) -> None:
    desk.imported(
        "b1", users=[desk.user("ada", updated=EARLIER), desk.user("bob", updated=EARLIER)]
    )
    report = desk.imported(
        "b2",
        users=[
            desk.user("bob", updated=LATER, email=desk.mail("new")),
            desk.user("ada", updated=LATER, email=desk.mail("bob")),
            desk.user("eve", updated=LATER, email=desk.mail("ada")),
        ],
    )
    assert report.applied == 3
    assert {name: row["email"] for name, row in desk.users().items()} == {
        "ada": desk.mail("bob"),
        "bob": desk.mail("new"),
        "eve": desk.mail("ada"),
    }


def test_a_user_may_be_known_from_an_earlier_file(desk: Desk) -> None:
    desk.imported("b1", users=[desk.user("ada")])
    report = desk.imported("b2", orders=[desk.order("o1", "ada"), desk.order("o2", "nobody")])
    assert (report.applied, report.quarantined) == (1, 1)
    assert report.errors[0].fault == "unknown-user"


def test_a_cancelled_order_stays_cancelled(desk: Desk) -> None:
    desk.imported(
        "b1",
        users=[desk.user("ada")],
        orders=[desk.order("o", "ada", updated=EARLIER, status="cancelled")],
    )
    report = desk.imported("b2", orders=[desk.order("o", "ada", updated=LATER, status="paid")])
    assert [error.fault for error in report.errors] == ["order-cancelled"]
    assert desk.orders()["o"]["status"] == "cancelled"


# --- what may change ---------------------------------------------------------------------------


@pytest.mark.requirement("R11")
def test_logistics_changes_only_phones_and_states(desk: Desk) -> None:
    desk.imported(
        "b1",
        users=[desk.user("ada", updated=EARLIER, more="<phone>1</phone><language>en</language>")],
        orders=[desk.order("o", "ada", updated=EARLIER, status="new")],
    )
    more = "<phone>2</phone><language>de</language>"
    lines = '<line sku="ink" qty="1" price="7"/>'

    report = desk.imported(
        "b2",
        source="logistics",
        users=[
            desk.user("ada", updated=LATER, name="Eve", email=desk.mail("eve"), more=more),
            desk.user("new", updated=LATER),
        ],
        orders=[
            desk.order(
                "o",
                "ada",
                "billing",
                updated=LATER,
                status="shipped",
                total="7.00",
                currency="USD",
                lines=lines,
            ),
            desk.order("new", "ada"),
        ],
    )

    ada, order = desk.users()["ada"], desk.orders()["o"]
    assert (ada["phone"], order["status"]) == ("2", "shipped")
    assert (ada["email"], ada["name"], ada["language"]) == (desk.mail("ada"), "Ada", "en")
    assert (order["currency"], str(order["total"]), order["systems"]) == ("EUR", "3", "")
    assert report.ignored_fields == dict.fromkeys(
        [
            "user.email",
            "user.name",
            "user.language",
            "order.currency",
            "order.total",
            "order.lines",
            "order.systems",
        ],
        1,
    )
    assert [error.fault for error in report.errors] == ["unknown-user", "unknown-order"]
    assert set(desk.users()) == {"ada"}


@pytest.mark.requirement("R11")
def test_elements_that_the_format_does_not_know_are_counted(desk: Desk) -> None:
    report = desk.imported("b", users=[desk.user("ada", more="<nickname>Countess</nickname>")])
    assert report.unknown == {"users/user/nickname": 1}
    assert report.applied == 1


def test_what_a_file_leaves_out_stays(desk: Desk) -> None:
    desk.imported("b1", users=[desk.user("ada", updated=EARLIER, more="<phone>1</phone>")])
    desk.imported("b2", users=[desk.user("ada", updated=LATER, name="Ada L.")])
    assert (desk.users()["ada"]["name"], desk.users()["ada"]["phone"]) == ("Ada L.", "1")


# --- what is said ------------------------------------------------------------------------------


@pytest.mark.requirement("R12")
def test_accounts_are_asked_for_by_orders_that_name_systems_and_no_others(desk: Desk) -> None:
    systems = ("billing", "loyalty", "shipping")
    desk.imported(
        "b",
        users=[desk.user("ada")],
        orders=[
            desk.order("none", "ada"),
            desk.order("one", "ada", "billing"),
            desk.order("three", "ada", *systems),
            desk.order("cancelled", "ada", *systems, status="cancelled"),
        ],
    )
    asked = {
        body["order_ref"].removeprefix(f"{desk.mark}-"): tuple(body["systems"])
        for name, body in desk.events()
        if name == "AccountsNeeded"
    }
    assert asked == {"one": ("billing",), "three": systems}
    states = {name: row["accounts_state"] for name, row in desk.orders().items()}
    assert states == {"none": "none", "one": "waiting", "three": "waiting", "cancelled": "none"}


@pytest.mark.requirement("R12")
def test_accounts_are_asked_for_once_however_often_the_order_comes(desk: Desk) -> None:
    desk.imported(
        "b1", users=[desk.user("ada")], orders=[desk.order("o", "ada", "billing", updated=EARLIER)]
    )
    report = desk.imported(
        "b2", orders=[desk.order("o", "ada", "billing", "loyalty", updated=LATER, status="paid")]
    )
    assert desk.said("AccountsNeeded") == [("AccountsNeeded", "o")]
    assert report.ignored_fields == {"order.systems": 1}


@pytest.mark.requirement("R57")
def test_each_change_is_told_by_an_event_that_says_what_it_means(desk: Desk) -> None:
    desk.imported(
        "b1",
        users=[desk.user("ada", updated=EARLIER), desk.user("bob", updated=EARLIER)],
        orders=[
            desk.order("o1", "ada", updated=EARLIER),
            desk.order("o2", "ada", updated=EARLIER),
            desk.order("o3", "ada", updated=EARLIER),
        ],
    )
    assert desk.said() == [
        ("UserImported", "ada"),
        ("UserImported", "bob"),
        ("OrderImported", "o1"),
        ("OrderImported", "o2"),
        ("OrderImported", "o3"),
    ]
    seen = len(desk.said())

    desk.imported(
        "b2",
        users=[
            desk.user("ada", updated=LATER, name="Ada L.", more="<phone>1</phone>"),
            desk.user("bob", updated=LATER, email=desk.mail("bob2")),
        ],
        orders=[
            desk.order("o1", "ada", updated=LATER, status="paid"),
            desk.order("o2", "ada", updated=LATER, status="cancelled"),
            desk.order("o3", "ada", updated=LATER),  # nothing has happened to it
        ],
    )
    assert sorted(desk.said()[seen:]) == [
        ("OrderCancelled", "o2"),
        ("OrderStatusChanged", "o1"),
        ("UserDetailsChanged", "ada"),
        ("UserEmailChanged", "bob"),
    ]
    [fields] = [body["fields"] for name, body in desk.events() if name == "UserDetailsChanged"]
    assert fields == ["name", "phone"]


@pytest.mark.requirement("R57")
def test_no_event_says_only_that_a_row_has_changed() -> None:
    events = [
        name.rpartition(".")[2]
        for name in (mt.name for mt in service.registry.types())
        if not name.startswith("sagacity.")
    ]
    assert events
    for name in events:
        assert not name.endswith(("Updated", "Saved", "RowChanged", "Modified")), name


@pytest.mark.requirement("R52")
def test_the_figures_of_the_day_are_a_plain_call_in_the_transaction_of_the_last_step(
    desk: Desk,
) -> None:
    before = {row["source"]: row["batches"] for row in desk.program.rows("importing", "statistics")}

    desk.imported("b", users=[desk.user("ada")])

    after = {row["source"]: row["batches"] for row in desk.program.rows("importing", "statistics")}
    assert after["crm"] == before.get("crm", 0) + 1
    # Nobody subscribes to the end of a batch: there is no event behind it.
    assert not any("BatchImported" in name for name in service.subscribers)


# --- each step after the one before it has committed -------------------------------------------


@pytest.mark.requirement("R16")
def test_whoever_hears_of_a_step_finds_it_committed(desk: Desk) -> None:
    """An observer of the bus asks the database, on a connection of its own, the moment it hears."""
    file = desk.generated("observed", {"users": 150, "orders": 450})
    program = desk.program
    wanted = {BatchReceived: 1, UserImported: 150, OrderImported: 450, ChunkApplied: 2}
    seen: set[Any] = set()  # the bus may bring one twice

    async def observe() -> None:
        async with _observer(program) as heard, _looking(program) as look:
            await submit(
                file, store=program.stores["importing"], bus=program.bus, prefix=program.prefix
            )
            async for message in heard:
                match message:
                    case BatchReceived(batch_id=batch_id):
                        found = await look(select(Batch.id).where(Batch.id == batch_id))
                    case ChunkApplied(batch_id=batch_id, chunk=chunk):
                        applied = (Batch.id == batch_id, Batch.chunks_applied > chunk)
                        found = await look(select(Batch.id).where(*applied))
                    case UserImported(user_ref=ref):
                        found = await look(select(User.ref).where(User.ref == ref))
                    case OrderImported(order_ref=ref):
                        found = await look(select(Order.ref).where(Order.ref == ref))
                    case _:
                        continue
                assert found is not None, message
                seen.add(message)
                if Counter(map(type, seen)) == wanted:
                    return

    asyncio.run(asyncio.wait_for(observe(), 60))
    program.wait_until_quiet()


@contextlib.asynccontextmanager
async def _looking(program: Program) -> AsyncGenerator[Callable[[Select[Any]], Awaitable[Any]]]:
    """Asks the database, each time in a transaction of its own."""
    store = SqlStore(program.stores["importing"])

    async def look(statement: Select[Any]) -> Any:
        async with store.engine.connect() as connection:
            await connection.execution_options(sagacity_read_only=True)
            return await connection.scalar(statement)

    try:
        yield look
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def _observer(program: Program) -> AsyncGenerator[AsyncGenerator[Any]]:
    """Everything that importing says from now on, by a group of its own that goes in the end."""
    bus = open_bus(program.bus, prefix=program.prefix)
    topics = ["batches", "users", "orders"]
    subscription = await bus.join("observer", "test", topics)
    skipped = True
    while skipped:
        skipped = bool(fresh := await subscription.read(1000, 1))
        await subscription.ack(fresh)

    async def heard() -> AsyncGenerator[Any]:
        while True:
            for delivery in await subscription.read(100, 100):
                assert delivery.envelope is not None
                await subscription.ack([delivery])
                kinds = (BatchReceived, ChunkApplied, UserImported, OrderImported)
                for kind in kinds:
                    if delivery.envelope.type.endswith(f".{kind.__name__}"):
                        yield msgspec.json.decode(delivery.envelope.body, type=kind)

    try:
        yield heard()
    finally:
        await subscription.close()
        await bus.close()
        with redis.Redis.from_url(program.bus) as client:
            for topic in topics:
                client.xgroup_destroy(f"{program.prefix}:{topic}", "observer")


# --- crashes -----------------------------------------------------------------------------------


@pytest.mark.outcome("O17")
def test_an_importer_killed_between_chunks_resumes_with_the_same_totals(desk: Desk) -> None:
    plan = {"users": 400, "orders": 1_600, "faults": {"bad-qty": 2, "unknown-user": 3}}
    file = desk.generated("killed", plan)
    program = desk.program
    program.load(file)
    for chunks in (1, 2):
        eventually(lambda: _chunks(program, desk.ref("killed")) >= chunks, "applying", 60)  # noqa: B023
        program.kill("importing")
        program.restart("importing")
    program.wait_until_quiet(60)

    report = desk.report("killed")
    assert (report.state, report.records, report.chunks_applied) == ("imported", 2_000, 4)
    assert (report.applied, report.stale, report.quarantined) == (1_995, 0, 5)
    events = Counter(name for name, body in desk.events() if "batch_id" in body)
    assert events["BatchImported"] == 1
    assert events["RecordRefused"] == 5


@pytest.mark.outcome("O17")
def test_an_importer_killed_while_staging_stages_anew(desk: Desk) -> None:
    file = desk.generated("staging", {"users": 500, "orders": 2_500})
    program = desk.program
    program.load(file)
    record = "record"
    eventually(
        lambda: bool(program.rows("importing", record, batch_id=desk.ref("staging"), seq=2_000)),
        "staging",
        60,
    )
    program.kill("importing")
    program.restart("importing")
    program.wait_until_quiet(60)

    report = desk.report("staging")
    assert (report.state, report.records, report.applied) == ("imported", 3_000, 3_000)


def _chunks(program: Program, batch_id: str) -> int:
    report = program.report(batch_id)
    return 0 if report is None else report.chunks_applied
