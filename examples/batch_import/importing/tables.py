"""What importing keeps: batches with their staged records, users, orders.

The entities say what happened to them (`RecordsEvents`); nothing here knows who listens.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, Literal

from sqlalchemy import (
    BigInteger,
    Dialect,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import JSON

from examples.batch_import.messages import (
    AccountsNeeded,
    BatchReceived,
    BatchRejected,
    OrderCancelled,
    OrderImported,
    OrderStatusChanged,
    RecordRefused,
    UserDetailsChanged,
    UserEmailChanged,
    UserImported,
)
from sagacity import RecordsEvents

BatchState = Literal["received", "staged", "applying", "imported", "rejected"]
RecordState = Literal["staged", "applied", "stale", "quarantined"]
_MICRO: Final = 1_000_000


class Instant(TypeDecorator[datetime]):
    """An aware datetime as microseconds since 1970, UTC: the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        del dialect
        if value is None:
            return None
        delta = value - datetime(1970, 1, 1, tzinfo=UTC)
        return (delta.days * 86_400 + delta.seconds) * _MICRO + delta.microseconds

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        del dialect
        if value is None:
            return None
        seconds, micro = divmod(value, _MICRO)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=micro)


class Amount(TypeDecorator[Decimal]):
    """A decimal as text: exact in every database, and never summed up there."""

    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> str | None:
        del dialect
        return None if value is None else f"{value.normalize():f}"

    def process_result_value(self, value: str | None, dialect: Dialect) -> Decimal | None:
        del dialect
        return None if value is None else Decimal(value)


class Stored(DeclarativeBase):
    """The tables of this context."""


metadata = Stored.metadata


class Batch(RecordsEvents, Stored):
    """One file: what it was, how far it is, and in the end the report."""

    __tablename__ = "importing_batch"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    path: Mapped[str]
    source: Mapped[str] = mapped_column(String(16), default="")
    state: Mapped[str] = mapped_column(String(16), default="received")
    received_at: Mapped[datetime] = mapped_column(Instant)
    finished_at: Mapped[datetime | None] = mapped_column(Instant)
    correlation_id: Mapped[str] = mapped_column(String(64))
    records: Mapped[int] = mapped_column(default=0)
    chunks: Mapped[int] = mapped_column(default=0)
    chunks_applied: Mapped[int] = mapped_column(default=0)
    applied: Mapped[int] = mapped_column(default=0)
    stale: Mapped[int] = mapped_column(default=0)
    quarantined: Mapped[int] = mapped_column(default=0)
    ignored_fields: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    """Field -> how often a record told another value than the one stored, and might not change it."""
    unknown: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    """What the format does not know, by path."""
    line: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str] = mapped_column(default="")

    def event_subject(self) -> str:
        return f"Batch/{self.id}"

    @property
    def finished(self) -> bool:
        return self.state in {"imported", "rejected"}

    def receive(self, path: str, digest: str, correlation_id: str, now: datetime) -> None:
        """A file was handed in under this id: the first, or the first after rejected ones."""
        self.path, self.digest, self.received_at = path, digest, now
        self.correlation_id = correlation_id
        self.state, self.line, self.reason, self.finished_at = "received", 0, "", None
        self.record(BatchReceived(self.id, path, digest))

    def reject(self, line: int, reason: str, now: datetime) -> None:
        """The file as a whole is no good; nothing of it was applied."""
        if self.state == "rejected":
            return
        self.state, self.line, self.reason, self.finished_at = "rejected", line, reason, now
        self.record(BatchRejected(self.id, line, reason))

    def refuse_record(self, line: int, kind: str, ref: str, reason: str) -> None:
        """One record is in quarantine."""
        self.record(RecordRefused(self.id, line, kind, ref, reason))

    def ignore_fields(self, counted: Mapping[str, int]) -> None:
        """Some fields told something else than what is stored, and may not change it."""
        if counted:
            known = self.ignored_fields
            self.ignored_fields = {
                name: known.get(name, 0) + counted.get(name, 0) for name in {*known, *counted}
            }


class Record(Stored):
    """One record of a batch, staged; the file's order is `seq`."""

    __tablename__ = "importing_record"

    batch_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    line: Mapped[int]
    kind: Mapped[str] = mapped_column(String(8))
    ref: Mapped[str] = mapped_column(String(40))
    body: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[str] = mapped_column(String(16))


class RecordError(Stored):
    """Why a record is in quarantine."""

    __tablename__ = "importing_error"

    batch_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    line: Mapped[int]
    kind: Mapped[str] = mapped_column(String(8))
    ref: Mapped[str] = mapped_column(String(40))
    fault: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str]


class User(RecordsEvents, Stored):
    """A user as the sources tell of him."""

    __tablename__ = "importing_user"

    ref: Mapped[str] = mapped_column(String(40), primary_key=True)
    email: Mapped[str]
    mailbox: Mapped[str] = mapped_column(unique=True)
    """The address without regard to case: one mailbox belongs to one user."""
    email_state: Mapped[str] = mapped_column(String(16), default="unconfirmed")
    """``unconfirmed`` or ``confirmed``; a copy, authentication knows best."""
    name: Mapped[str]
    phone: Mapped[str | None]
    language: Mapped[str | None]
    source_updated: Mapped[datetime] = mapped_column(Instant)
    version: Mapped[int] = mapped_column(default=1)
    email_version: Mapped[int] = mapped_column(default=1)
    """The version since which the address is this one."""

    def event_subject(self) -> str:
        return f"User/{self.ref}"

    @classmethod
    def imported(cls, ref: str, email: str, updated: datetime, **details: str | None) -> "User":
        """A user is seen for the first time, in an import: nobody has asked for a welcome mail."""
        user = cls(
            ref=ref,
            email=email,
            mailbox=mailbox_of(email),
            email_state="unconfirmed",
            source_updated=updated,
            version=1,
            email_version=1,
            **details,
        )
        user.record(UserImported(ref, email))
        return user

    def change_email(self, email: str) -> None:
        """The address is another one since this version, and nobody has confirmed it."""
        self.email, self.mailbox = email, mailbox_of(email)
        self.email_state, self.email_version = "unconfirmed", self.version
        self.record(UserEmailChanged(self.ref, email, self.version))

    def change_details(self, changed: Mapping[str, Any]) -> None:
        """Name, phone or language are others now."""
        for name, value in changed.items():
            setattr(self, name, value)
        if changed:
            self.record(UserDetailsChanged(self.ref, sorted(changed)))


class Order(RecordsEvents, Stored):
    """An order as the sources tell of it."""

    __tablename__ = "importing_order"
    __table_args__ = (Index("importing_order_by_user", "user_ref"),)

    ref: Mapped[str] = mapped_column(String(40), primary_key=True)
    user_ref: Mapped[str] = mapped_column(String(40))
    status: Mapped[str] = mapped_column(String(16))
    currency: Mapped[str] = mapped_column(String(3))
    total: Mapped[Decimal] = mapped_column(Amount)
    systems: Mapped[str] = mapped_column(default="")
    """Codes of the systems in which it asks for accounts, in the file's order, joined by spaces."""
    accounts_state: Mapped[str] = mapped_column(String(16), default="none")
    """``none`` asked for, ``waiting``, ``ready``, ``failed`` or ``cancelled``; accounts knows best."""
    source_updated: Mapped[datetime] = mapped_column(Instant)
    version: Mapped[int] = mapped_column(default=1)

    def event_subject(self) -> str:
        return f"Order/{self.ref}"

    def imported(self) -> None:
        """It is seen for the first time."""
        self.record(OrderImported(self.ref, self.user_ref))

    def need_accounts(self, email: str, version: int, systems: list[str], plans: list[str]) -> None:
        """It asks for accounts. Whether its user may have them is not known here."""
        self.systems, self.accounts_state = " ".join(systems), "waiting"
        self.record(AccountsNeeded(self.ref, self.user_ref, email, systems, plans, version))

    def change_status(self, status: str) -> None:
        """Its status is another one now."""
        self.status = status
        self.record(
            OrderCancelled(self.ref)
            if status == "cancelled"
            else OrderStatusChanged(self.ref, status)
        )


class OrderLine(Stored):
    """One line of an order."""

    __tablename__ = "importing_order_line"

    order_ref: Mapped[str] = mapped_column(
        ForeignKey(Order.ref, ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sku: Mapped[str] = mapped_column(String(64))
    qty: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Amount)


class DayStatistics(Stored):
    """What was imported on a day, by source."""

    __tablename__ = "importing_statistics"

    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    source: Mapped[str] = mapped_column(String(16), primary_key=True)
    batches: Mapped[int] = mapped_column(default=0)
    records: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)


def mailbox_of(email: str) -> str:
    """The address as it is compared with others."""
    return email.casefold()
