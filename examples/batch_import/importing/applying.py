"""From staging rows to users and orders: one chunk, a handful of statements.

A record is a full representation; which of it may change what is stored depends on who sent the file.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.batch_import.batch_file import Line, OrderRecord, UserRecord
from examples.batch_import.importing.tables import (
    Batch,
    Order,
    OrderLine,
    Record,
    RecordError,
    RecordState,
    User,
    mailbox_of,
)

CHUNK: Final = 500
"""Records of one transaction."""
ALLOWED: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "crm": {
        "user": frozenset({"email", "name", "phone", "language"}),
        "order": frozenset({"status", "currency", "total", "lines"}),
    },
    "logistics": {
        "user": frozenset({"phone"}),
        "order": frozenset({"status"}),
    },
}
"""What each source may change. Only crm brings new users and orders; which user an order belongs to
and which accounts it asks for is settled when it is new."""

_decoder: msgspec.json.Decoder[UserRecord | OrderRecord] = msgspec.json.Decoder(
    UserRecord | OrderRecord
)


class Quarantined(Exception):
    """The record cannot be applied to what is stored."""

    def __init__(self, fault: str, reason: str) -> None:
        super().__init__(reason)
        self.fault, self.reason = fault, reason


async def apply_chunk(session: AsyncSession, batch: Batch, chunk: int) -> None:
    """Apply the staged records number `chunk` * 500 and up to 500 in all, and count them."""
    work = _Chunk(session, batch, chunk)
    with session.no_autoflush:
        await work.load()
        await work.apply()
        await work.write()


class _Chunk:
    """The records of one chunk, and everything stored that they touch."""

    def __init__(self, session: AsyncSession, batch: Batch, chunk: int) -> None:
        self.session, self.batch = session, batch
        self.seqs = (chunk * CHUNK + 1, (chunk + 1) * CHUNK)
        self.records: list[UserRecord | OrderRecord] = []
        self.users: dict[str, User] = {}
        self.emails: dict[str, tuple[str, int]] = {}
        """User of an order -> the address and the version of the user."""
        self.owners: dict[str, str] = {}
        self.released: set[str] = set()
        self.orders: dict[str, Order] = {}
        self.lines: dict[str, tuple[Line, ...]] = {}
        self.new_lines: list[tuple[str, tuple[Line, ...]]] = []
        self.states: dict[RecordState, list[int]] = {"applied": [], "stale": [], "quarantined": []}
        self.errors: list[dict[str, Any]] = []
        self.ignored: Counter[str] = Counter()
        allowed = ALLOWED[batch.source]
        self.user_fields, self.order_fields = allowed["user"], allowed["order"]

    # --------------------------------------------------------------------------------------- load

    async def load(self) -> None:
        """Read the records and, with one question per table, what they are about.

        Rows that may change are locked in the order of their keys, so that two batches that touch
        the same ones wait for each other and not for ever.
        """
        session, batch_id = self.session, self.batch.id
        staged = await session.execute(
            select(Record.body)
            .where(
                Record.batch_id == batch_id,
                Record.seq.between(*self.seqs),
                Record.state == "staged",
            )
            .order_by(Record.seq)
        )
        self.records = [_decoder.decode(row.body) for row in staged]
        users = [record for record in self.records if isinstance(record, UserRecord)]
        orders = [record for record in self.records if isinstance(record, OrderRecord)]
        if users:
            await self._load_users(users)
        if orders:
            await self._load_orders(orders)

    async def _load_users(self, records: list[UserRecord]) -> None:
        refs = {record.ref for record in records}
        found = await self.session.scalars(
            select(User).where(User.ref.in_(sorted(refs))).order_by(User.ref).with_for_update()
        )
        self.users = {user.ref: user for user in found}
        mailboxes = {mailbox_of(record.email) for record in records}
        owners = await self.session.execute(
            select(User.mailbox, User.ref).where(User.mailbox.in_(sorted(mailboxes)))
        )
        self.owners = {row.mailbox: row.ref for row in owners}

    async def _load_orders(self, records: list[OrderRecord]) -> None:
        refs = {record.ref for record in records}
        found = await self.session.scalars(
            select(Order).where(Order.ref.in_(sorted(refs))).order_by(Order.ref).with_for_update()
        )
        self.orders = {order.ref: order for order in found}
        owners = {record.user_ref for record in records} - self.users.keys()
        emails = await self.session.execute(
            select(User.ref, User.email, User.version).where(User.ref.in_(sorted(owners)))
        )
        self.emails = {row.ref: (row.email, row.version) for row in emails}
        if self.orders:
            lines = await self.session.execute(
                select(OrderLine.order_ref, OrderLine.sku, OrderLine.qty, OrderLine.price)
                .where(OrderLine.order_ref.in_(sorted(self.orders)))
                .order_by(OrderLine.order_ref, OrderLine.number)
            )
            for ref, sku, qty, price in lines:
                self.lines[ref] = (*self.lines.get(ref, ()), Line(sku, qty, price))

    # -------------------------------------------------------------------------------------- apply

    async def apply(self) -> None:
        """Apply the records one after the other, in memory."""
        for record in self.records:
            try:
                if isinstance(record, UserRecord):
                    if mailbox_of(record.email) in self.released:
                        # Somebody in this chunk gave the address up: the database must know first.
                        await self.session.flush()
                        self.released.clear()
                    state = self._apply_user(record)
                else:
                    state = self._apply_order(record)
            except Quarantined as found:
                state = "quarantined"
                self.errors.append(
                    {
                        "batch_id": self.batch.id,
                        "seq": record.seq,
                        "line": record.line,
                        "kind": "user" if isinstance(record, UserRecord) else "order",
                        "ref": record.ref,
                        "fault": found.fault,
                        "reason": found.reason,
                    }
                )
            self.states[state].append(record.seq)

    def _apply_user(self, record: UserRecord) -> RecordState:
        user = self.users.get(record.ref)
        if user is not None and record.updated < user.source_updated:
            return "stale"
        told: dict[str, Any] = {"email": record.email, "name": record.name}
        # An optional element that is not there says nothing.
        told |= {"phone": record.phone} if record.phone is not None else {}
        told |= {"language": record.language} if record.language is not None else {}
        if user is None:
            return self._new_user(record, told)
        changed = self._changes(user, told, self.user_fields, "user")
        if "email" in changed:
            self._claim(record.email, record.ref)
        user.version += 1
        if "email" in changed:
            self.owners.pop(user.mailbox, None)
            self.released.add(user.mailbox)
            user.change_email(changed.pop("email"))
            self.owners[user.mailbox] = record.ref
        user.change_details(changed)
        user.source_updated = record.updated
        return "applied"

    def _new_user(self, record: UserRecord, told: Mapping[str, Any]) -> RecordState:
        if "email" not in self.user_fields:
            raise Quarantined(
                "unknown-user",
                f"user {record.ref!r} is not known; {self.batch.source} may not bring new users",
            )
        self._claim(record.email, record.ref)
        details = {name: told.get(name) for name in ("name", "phone", "language")}
        user = User.imported(record.ref, record.email, record.updated, **details)
        self.session.add(user)
        self.users[record.ref] = user
        self.owners[user.mailbox] = record.ref
        return "applied"

    def _claim(self, email: str, ref: str) -> None:
        owner = self.owners.get(mailbox_of(email))
        if owner not in {None, ref}:
            raise Quarantined("address-taken", f"address {email} belongs to user {owner!r}")

    def _apply_order(self, record: OrderRecord) -> RecordState:
        order = self.orders.get(record.ref)
        if order is None:
            return self._new_order(record)
        if record.updated < order.source_updated:
            return "stale"
        if order.status == "cancelled" and record.status != "cancelled":
            raise Quarantined(
                "order-cancelled",
                f"order {record.ref!r} is cancelled; it cannot be {record.status}",
            )
        told = {
            "user_ref": record.user_ref,
            "status": record.status,
            "currency": record.currency,
            "total": record.total,
            "systems": _codes(record),
        }
        changed = self._changes(order, told, self.order_fields, "order")
        if self.lines.get(record.ref, ()) != record.lines:
            if "lines" in self.order_fields:
                self.new_lines.append((record.ref, record.lines))
            else:
                self.ignored["order.lines"] += 1
        if "status" in changed:
            order.change_status(changed.pop("status"))
        for name, value in changed.items():
            setattr(order, name, value)
        order.source_updated = record.updated
        order.version += 1
        return "applied"

    def _new_order(self, record: OrderRecord) -> RecordState:
        if "lines" not in self.order_fields:
            raise Quarantined(
                "unknown-order",
                f"order {record.ref!r} is not known; {self.batch.source} may not bring new orders",
            )
        user = self.users.get(record.user_ref)
        known = self.emails.get(record.user_ref)
        if user is not None:
            known = (user.email, user.version)
        if known is None:
            raise Quarantined(
                "unknown-user", f"user {record.user_ref!r} is neither in the file nor known"
            )
        order = Order(
            ref=record.ref,
            user_ref=record.user_ref,
            status=record.status,
            currency=record.currency,
            total=record.total,
            systems=_codes(record),
            accounts_state="none",  # rows with the same columns are inserted together
            source_updated=record.updated,
            version=1,
        )
        order.imported()
        if record.systems and record.status != "cancelled":
            order.need_accounts(
                *known,
                [need.code for need in record.systems],
                [need.plan or "" for need in record.systems],
            )
        self.session.add(order)
        self.orders[record.ref] = order
        self.new_lines.append((record.ref, record.lines))
        return "applied"

    def _changes(
        self, entity: User | Order, told: Mapping[str, Any], allowed: frozenset[str], kind: str
    ) -> dict[str, Any]:
        """What differs and may change; what differs and may not is counted."""
        differing = {name: value for name, value in told.items() if getattr(entity, name) != value}
        self.ignored.update(f"{kind}.{name}" for name in differing.keys() - allowed)
        return {name: value for name, value in differing.items() if name in allowed}

    # -------------------------------------------------------------------------------------- write

    async def write(self) -> None:
        """Write lines, states and errors, and tell of every record in quarantine."""
        session, batch = self.session, self.batch
        await session.flush()
        await self._write_lines()
        mine = (Record.batch_id == batch.id, Record.seq.between(*self.seqs))
        for state in ("stale", "quarantined"):
            if self.states[state]:
                await session.execute(
                    update(Record)
                    .where(Record.batch_id == batch.id, Record.seq.in_(self.states[state]))
                    .values(state=state)
                )
        await session.execute(
            update(Record).where(*mine, Record.state == "staged").values(state="applied")
        )
        if self.errors:
            await session.execute(insert(RecordError), self.errors)
        quarantined = await session.execute(
            select(RecordError.line, RecordError.kind, RecordError.ref, RecordError.reason)
            .where(RecordError.batch_id == batch.id, RecordError.seq.between(*self.seqs))
            .order_by(RecordError.seq)
        )
        for line, kind, ref, reason in quarantined:
            batch.refuse_record(line, kind, ref, reason)
            batch.quarantined += 1
        batch.applied += len(self.states["applied"])
        batch.stale += len(self.states["stale"])
        batch.ignore_fields(self.ignored)

    async def _write_lines(self) -> None:
        known = [ref for ref, _ in self.new_lines if ref in self.lines]
        if known:
            await self.session.execute(delete(OrderLine).where(OrderLine.order_ref.in_(known)))
        rows = [
            {
                "order_ref": ref,
                "number": number,
                "sku": line.sku,
                "qty": line.qty,
                "price": line.price,
            }
            for ref, lines in self.new_lines
            for number, line in enumerate(lines, start=1)
        ]
        if rows:
            await self.session.execute(insert(OrderLine), rows)


def _codes(record: OrderRecord) -> str:
    return " ".join(need.code for need in record.systems)
