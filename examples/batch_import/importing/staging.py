"""From the file to staging rows: one pass in flat memory, many small transactions."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import anyio.to_thread
import msgspec
from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from examples.batch_import.batch_file import (
    BatchHead,
    BatchItem,
    BatchTail,
    FileRefused,
    RefusedRecord,
    UserRecord,
    digest,
    read_batch,
)
from examples.batch_import.importing.tables import Record, RecordError

ROWS: Final = 2_000
"""Records per transaction: short enough that nobody waits long for the database."""
_encoder = msgspec.json.Encoder()


class Staged(msgspec.Struct, frozen=True):
    """What a file turned out to hold."""

    source: str
    records: int
    unknown: dict[str, int]


class _Portion(msgspec.Struct):
    """Rows for one transaction."""

    records: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    head: BatchHead | None = None
    tail: BatchTail | None = None


async def stage(engine: AsyncEngine, batch_id: str, path: str, expected_digest: str) -> Staged:
    """Read the whole file into staging rows of the batch, in place of what a broken try left.

    Raises FileRefused where the file as a whole is no good: then rows may be left behind.
    """
    await discard(engine, batch_id)
    found = await anyio.to_thread.run_sync(_digest_of, path)
    if found != expected_digest:
        raise FileRefused(1, f"the file has changed since it was handed in: its SHA-256 is {found}")
    items = read_batch(path)
    source, records, unknown = "", 0, dict[str, int]()
    while True:
        portion = await anyio.to_thread.run_sync(_next_portion, items, batch_id)
        if portion.head is not None:
            if portion.head.id != batch_id:
                raise FileRefused(
                    1, f"the file says batch {portion.head.id}; it came in as {batch_id}"
                )
            source = portion.head.source
        if portion.records:
            async with engine.begin() as connection:
                await connection.execute(insert(Record), portion.records)
                if portion.errors:
                    await connection.execute(insert(RecordError), portion.errors)
        records += len(portion.records)
        if portion.tail is not None:
            unknown = dict(portion.tail.unknown)
            return Staged(source, records, unknown)


async def discard(engine: AsyncEngine, batch_id: str) -> None:
    """Forget what is staged of a batch."""
    for table in (RecordError, Record):
        while True:
            async with engine.begin() as connection:
                first = await connection.scalar(
                    select(func.min(table.seq)).where(table.batch_id == batch_id)
                )
                if first is None:
                    break
                await connection.execute(
                    delete(table).where(table.batch_id == batch_id, table.seq < first + ROWS)
                )


def _digest_of(path: str) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise FileRefused(0, f"the file cannot be read: {error.strerror}") from error


def _next_portion(items: Iterator[BatchItem], batch_id: str) -> _Portion:
    """The next rows; parsing and encoding are done here, in a thread of their own."""
    portion = _Portion()
    for item in islice(items, ROWS):
        if isinstance(item, BatchHead):
            portion.head = item
        elif isinstance(item, BatchTail):
            portion.tail = item
        elif isinstance(item, RefusedRecord):
            portion.records.append(
                {
                    "batch_id": batch_id,
                    "seq": item.seq,
                    "line": item.line,
                    "kind": item.kind,
                    "ref": item.ref[:40],
                    "body": b"",
                    "state": "quarantined",
                }
            )
            portion.errors.append(
                {
                    "batch_id": batch_id,
                    "seq": item.seq,
                    "line": item.line,
                    "kind": item.kind,
                    "ref": item.ref[:40],
                    "fault": item.fault,
                    "reason": item.reason,
                }
            )
        else:
            portion.records.append(
                {
                    "batch_id": batch_id,
                    "seq": item.seq,
                    "line": item.line,
                    "kind": "user" if isinstance(item, UserRecord) else "order",
                    "ref": item.ref,
                    "body": _encoder.encode(item),
                    "state": "staged",
                }
            )
    return portion
