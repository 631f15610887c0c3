"""What the reader yields: frozen values that encode to JSON and decode back by their `record` tag."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Literal

import msgspec

NAMESPACE = "urn:batch-import:1"
VERSION = "1"
SYSTEMS = frozenset({"billing", "shipping", "loyalty"})
"""The systems an order may name unless the reader is told others."""

Source = Literal["crm", "logistics"]
Status = Literal["new", "paid", "shipped", "cancelled"]
Kind = Literal["user", "order"]
Fault = Literal[
    "bad-ref",
    "bad-updated",
    "bad-email",
    "bad-name",
    "bad-phone",
    "bad-language",
    "bad-user",
    "bad-status",
    "bad-currency",
    "bad-total",
    "bad-line",
    "bad-qty",
    "bad-price",
    "bad-system",
    "bad-plan",
    "missing-element",
    "repeated-element",
    "line-count",
    "system-count",
    "unknown-system",
    "repeated-system",
    "total-mismatch",
    "duplicate-ref",
]
"""Why one record is refused, as far as the file alone can tell."""


class FileRefused(Exception):
    """The file as a whole is not acceptable; nothing of it may be applied.

    `line` is the line where the fault was noticed, 1-based; `reason` says what was found and expected.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class BatchHead(msgspec.Struct, frozen=True, tag_field="record", tag="head"):
    """The root element's attributes; `created` is in UTC."""

    id: str
    source: Source
    created: datetime


class UserRecord(msgspec.Struct, frozen=True, tag_field="record", tag="user"):
    """One user as the file tells it; which fields may be changed is the importer's business.

    `seq` counts the records of the file from 1, accepted or refused, users and orders together;
    `line` is where the record starts. Absent optional elements are None.
    """

    seq: int
    line: int
    ref: str
    updated: datetime
    email: str
    name: str
    phone: str | None = None
    language: str | None = None


class Line(msgspec.Struct, frozen=True):
    """One line of an order; `price` is per piece."""

    sku: str
    qty: int
    price: Decimal


class SystemNeed(msgspec.Struct, frozen=True):
    """One remote system in which the order wants an account for its user."""

    code: str
    plan: str | None = None


class OrderRecord(msgspec.Struct, frozen=True, tag_field="record", tag="order"):
    """One order; `lines` add up to `total` exactly and the codes in `systems` are distinct."""

    seq: int
    line: int
    ref: str
    user_ref: str
    updated: datetime
    status: Status
    currency: str
    total: Decimal
    lines: tuple[Line, ...]
    systems: tuple[SystemNeed, ...] = ()


class RefusedRecord(msgspec.Struct, frozen=True, tag_field="record", tag="refused"):
    """A record that is to be quarantined; the rest of the file proceeds.

    `ref` is empty when the record has none; `reason` is for people, `fault` for programs.
    """

    seq: int
    line: int
    kind: Kind
    ref: str
    fault: Fault
    reason: str


class BatchTail(msgspec.Struct, frozen=True, tag_field="record", tag="tail"):
    """Comes last and only if the whole file was acceptable.

    `users` and `orders` count the accepted records. `unknown` counts what was ignored, by path:
    elements (`users/user/nickname`), attributes (`orders/order/@colour`) and stray text
    (`users/user/#text`).
    """

    users: int
    orders: int
    refused: int
    unknown: Mapping[str, int]


BatchItem = BatchHead | UserRecord | OrderRecord | RefusedRecord | BatchTail
