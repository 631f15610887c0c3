"""What the outcome tests have in common: users and orders of their own, files, and the questions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
from sqlalchemy import select, update

from examples.batch_import.program import Program
from examples.batch_import.reading import read_rows
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.tables import dead_letter, outbox, parked, saga
from sagacity.core.delivery import Envelope
from sagacity.core.messages import Message, encode_message, message_type
from sagacity.worker.opening import open_bus
from tests.examples.batch_import import documents
from tests.waiting import eventually

M = TypeVar("M", bound=Message)

QUIET_WITHIN_S = 60.0
_numbers = itertools.count(1)


class Scene:
    """One test's part of a running program: refs that no other test uses."""

    def __init__(self, program: Program, directory: Path) -> None:
        self.program = program
        self._directory = directory
        self._name = f"t{next(_numbers)}"
        self._files = itertools.count(1)
        self._minutes = itertools.count(1)
        self._adopted: dict[str, tuple[str, str]] = {}

    def ref(self, name: str) -> str:
        return self._adopted.get(name, (f"{self._name}-{name}", ""))[0]

    def email(self, name: str) -> str:
        return self._adopted.get(name, ("", f"{name}@{self._name}.example.test"))[1]

    def adopt(self, name: str, other: Scene, original: str) -> None:
        """Call a user of another scene by a name of this one."""
        self._adopted[name] = (other.ref(original), other.email(original))

    # ---------------------------------------------------------------------------------------- files

    def user(self, name: str, *, email: str = "") -> str:
        """A user record, newer than all before it."""
        return documents.user(
            self.ref(name), email=email or self.email(name), updated=self._updated()
        )

    def order(
        self, name: str, user: str, *systems: str, status: str = "new", plan: str = ""
    ) -> str:
        """An order record that asks for accounts in these systems."""
        accounts = "".join(
            f'<system code="{system}"{f" plan={plan!r}" if plan else ""}/>' for system in systems
        )
        return documents.order(
            self.ref(name),
            user_ref=self.ref(user),
            accounts=accounts,
            status=status,
            updated=self._updated(),
        )

    def _updated(self) -> str:
        minute = next(self._minutes)
        return f"2026-01-30T{12 + minute // 60:02}:{minute % 60:02}:00Z"

    def hand_in(self, *, users: Iterable[str] = (), orders: Iterable[str] = ()) -> str:
        """Load a file without waiting for what follows; returns its batch id."""
        batch_id = f"{self._name}-b{next(self._files)}"
        root = documents.ROOT.replace('id="b-1"', f'id="{batch_id}"')
        inside = documents.users(*users) + documents.orders(*orders)
        file = self._directory / f"{batch_id}.xml"
        file.write_bytes(documents.document(inside, root=root))
        self.program.load(file)
        return batch_id

    def load(self, *, users: Iterable[str] = (), orders: Iterable[str] = ()) -> str:
        """Load a file and wait until nothing moves any more; every record must be applied."""
        batch_id = self.hand_in(users=users, orders=orders)
        self.settle()
        report = self.program.report(batch_id)
        assert report is not None
        assert (report.state, report.quarantined) == ("imported", 0), report
        return batch_id

    def settle(self) -> None:
        """Wait until nothing moves any more."""
        self.program.wait_until_quiet(QUIET_WITHIN_S)

    def confirm(self, name: str, *, email: str = "") -> None:
        """Press the button in the newest mail, and wait until nothing moves any more."""
        self.press(self.program.link(email or self.email(name)))
        self.settle()

    def press(self, link: str) -> None:
        assert self.program.follow(link).status_code == 202

    def confirmed_users(self, *names: str) -> None:
        """Load users whose addresses are confirmed, through orders that were cancelled meanwhile.

        They hold no accounts, and no remote system was asked.
        """
        firsts = [f"{name}-first" for name in names]
        orders = [
            self.order(first, name, "billing") for first, name in zip(firsts, names, strict=True)
        ]
        self.load(users=[self.user(name) for name in names], orders=orders)
        orders = [
            self.order(first, name, "billing", status="cancelled")
            for first, name in zip(firsts, names, strict=True)
        ]
        self.load(orders=orders)
        for name in names:
            self.press(self.program.link(self.email(name)))
        self.settle()

    # ------------------------------------------------------------------------------------ questions

    def order_state(self, name: str) -> str:
        """What importing knows of the order's accounts."""
        (row,) = self.program.rows("importing", "order", ref=self.ref(name))
        return str(row["accounts_state"])

    def order_states(self, *names: str) -> list[str]:
        return [self.order_state(name) for name in names]

    def is_imported(self, batch_id: str) -> bool:
        report = self.program.report(batch_id)
        return report is not None and report.state == "imported"

    def holds(self, name: str) -> dict[str, str]:
        """System -> state of an order's hold there."""
        rows = self.program.rows("accounts", "requirement", order_ref=self.ref(name))
        return {row["system"]: row["state"] for row in rows}

    def optins(self, name: str) -> list[dict[str, Any]]:
        """The opt-in cycles of a user, first one first."""
        rows = self.program.rows("authentication", "optin", user_ref=self.ref(name))
        return sorted(rows, key=lambda row: int(row["cycle"]))

    def accounts(self, name: str) -> dict[str, int]:
        """System -> live accounts of a user there, as the systems' ledgers tell."""
        counts = {
            system: sum(1 if entry == "create" else -1 for entry in self.entries(system, name))
            for system in self.program.remotes
        }
        return {system: count for system, count in counts.items() if count}

    def entries(self, system: str, name: str) -> list[str]:
        """``create`` and ``delete`` in the ledger of a system, as far as one user is concerned."""
        return [
            row["operation"]
            for row in self.program.ledger(system)
            if row["external_ref"] == self.ref(name)
        ]

    def calls(self, name: str) -> list[tuple[str, str, int | None]]:
        """(system, operation, status) of every request about a user that a system got."""
        return [
            (system, row["operation"], row["status"])
            for system in self.program.remotes
            for row in self.program.calls(system)
            if row["external_ref"] == self.ref(name)
        ]

    def mails(self, name: str) -> list[dict[str, Any]]:
        return self.program.mails(self.email(name))

    def saga(self, saga_type: str, name: str) -> dict[str, str]:
        """Status and state of a saga instance; its key is a ref of this scene."""
        service = {"OptInSaga": "authentication", "AccountSaga": "accounts"}[saga_type]
        found = sagas(self.program, service, saga_type, self.ref(name))
        assert found is not None, f"no {saga_type} of {name}"
        return found

    def fault(self, system: str, name: str, *rules: Mapping[str, Any]) -> None:
        """Let requests about one user go wrong in a system; replaces what was set there."""
        self.program.set_faults(
            system, *({**rule, "match": {"user": self.ref(name)}} for rule in rules)
        )

    def until_held(self, system: str) -> None:
        """Wait until a fault of a system makes a request wait."""
        eventually(
            lambda: any(rule["waiting"] for rule in self.program.faults(system)),
            f"a request held by {system}",
        )

    def until_made(self, system: str, name: str) -> None:
        """Wait until a user's account exists in a system, whether its answer has come or not."""
        eventually(lambda: self.entries(system, name)[-1:] == ["create"], f"an account in {system}")

    def until_status(self, saga_type: str, name: str, status: str) -> None:
        eventually(lambda: self.saga(saga_type, name)["status"] == status, f"{name} to be {status}")


def sagas(program: Program, service: str, saga_type: str, key: str) -> dict[str, str] | None:
    """Status and state of one instance."""

    async def look() -> dict[str, str] | None:
        store = SqlStore(program.stores[service])
        try:
            found = await store.saga(saga_type, key)
        finally:
            await store.close()
        return None if found is None else {"status": str(found.status), "state": found.state}

    return asyncio.run(look())


def replace_data(program: Program, service: str, key: str, data: bytes) -> bytes:
    """Overwrite the stored data of the one saga instance with this key; returns what was there."""

    async def swap() -> bytes:
        store = SqlStore(program.stores[service])
        try:
            async with store.engine.begin() as connection:
                where = saga.c.saga_key == key.encode()
                before = (await connection.execute(select(saga.c.data).where(where))).scalar_one()
                await connection.execute(update(saga).where(where).values(data=data))
        finally:
            await store.close()
        return bytes(before)

    return asyncio.run(swap())


def attempts(program: Program, service: str) -> int:
    """The most failed attempts that any message waiting in a service has behind it."""
    rows = asyncio.run(read_rows(program.stores[service], parked, {}))
    return max((int(row["attempts"]) for row in rows), default=0)


def dead_letters(program: Program, service: str) -> list[dict[str, Any]]:
    """The dead letters of a service."""
    return asyncio.run(read_rows(program.stores[service], dead_letter, {}))


def emitted(program: Program, service: str, message: type[M], **equal: object) -> list[M]:
    """The messages of one class with these fields in a service's outbox, first one first."""
    name = message_type(message).name
    rows = asyncio.run(read_rows(program.stores[service], outbox, {"message_type": name}))
    found = [msgspec.json.decode(row["body"], type=message) for row in rows]
    return [
        one for one in found if all(getattr(one, field) == value for field, value in equal.items())
    ]


def assert_green(program: Program) -> None:
    """`check` finds nothing wrong."""
    wrong = {verdict.name: verdict.wrong for verdict in program.check() if not verdict.holds}
    assert wrong == {}


def publish(program: Program, *messages: Message) -> None:
    """Put messages on the bus as some other service would, and wait until nothing moves any more."""
    send(program, *messages)
    program.wait_until_quiet(QUIET_WITHIN_S)


def send(program: Program, *messages: Message) -> None:
    """Put messages on the bus as some other service would."""
    envelopes: list[Envelope] = []
    for message in messages:
        facts = message_type(message)
        message_id = uuid4().hex
        envelopes.append(
            Envelope(
                id=message_id,
                type=facts.name,
                topic=facts.topic,
                version=facts.version,
                body=encode_message(message),
                source="test",
                correlation_id=message_id,
            )
        )

    async def deliver() -> None:
        bus = open_bus(program.bus, prefix=program.prefix)
        try:
            await bus.publish(envelopes)
        finally:
            await bus.close()

    asyncio.run(deliver())
