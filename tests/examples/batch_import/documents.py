"""Small batch documents for the tests of the reader."""

import io
from collections.abc import Iterable

from examples.batch_import.batch_file import BatchItem, Limits, read_batch

ROOT = '<batch xmlns="urn:batch-import:1" id="b-1" source="crm" created="2026-01-31T12:00:00Z" version="1">'
UPDATED = "2026-01-30T12:00:00Z"


def document(inside: str = "", *, root: str = ROOT, before: str = "") -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{before}{root}\n{inside}\n</batch>\n'.encode()


def users(*records: str) -> str:
    return _section("users", records)


def orders(*records: str) -> str:
    return _section("orders", records)


def _section(name: str, records: Iterable[str]) -> str:
    lines = "\n".join(records)
    return f"<{name}>\n{lines}\n</{name}>"


def user(
    ref: str = "u-1",
    *,
    updated: str = UPDATED,
    email: str = "ada@example.test",
    name: str = "Ada",
    more: str = "",
) -> str:
    return (
        f'<user ref="{ref}" updated="{updated}">'
        f"<email>{email}</email><name>{name}</name>{more}</user>"
    )


def order(
    ref: str = "o-1",
    *,
    user_ref: str = "u-1",
    updated: str = UPDATED,
    status: str = "new",
    currency: str = "EUR",
    total: str = "3.00",
    lines: str = '<line sku="pen" qty="2" price="1.50"/>',
    accounts: str = "",
    more: str = "",
) -> str:
    return (
        f'<order ref="{ref}" user="{user_ref}" updated="{updated}"><status>{status}</status>'
        f"<currency>{currency}</currency><total>{total}</total><lines>{lines}</lines>"
        f"<accounts>{accounts}</accounts>{more}</order>"
    )


def read(
    data: bytes, *, systems: frozenset[str] | None = None, limits: Limits | None = None
) -> list[BatchItem]:
    if systems is None:
        return list(read_batch(io.BytesIO(data), limits=limits))
    return list(read_batch(io.BytesIO(data), systems=systems, limits=limits))
