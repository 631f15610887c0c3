"""I6 and I7: what became of the records of a batch."""

from collections.abc import AsyncGenerator
from itertools import groupby
from typing import Any

import msgspec
from sqlalchemy import and_, func, select

from examples.batch_import.batch_file import OrderRecord, UserRecord
from examples.batch_import.checking.evidence import Found
from examples.batch_import.checking.invariant import invariant


@invariant(
    "I6",
    "every staged record is applied, stale or in quarantine, as the report says",
    about=["importing"],
)
async def records_are_settled(found: Found) -> list[str]:
    batch, record = found.table("importing", "batch"), found.table("importing", "record")
    counts: dict[str, dict[str, int]] = {}
    for batch_id, state, count in await found.rows(
        "importing",
        select(record.c.batch_id, record.c.state, func.count()).group_by(
            record.c.batch_id, record.c.state
        ),
    ):
        counts.setdefault(batch_id, {})[state] = count
    wrong: list[str] = []
    for row in await found.rows("importing", select(batch)):
        states = counts.pop(row.id, {})
        if row.state == "rejected" and states:
            wrong.append(f"batch {row.id} is rejected and has left records: {states}")
        elif row.state == "imported":
            told = {"applied": row.applied, "stale": row.stale, "quarantined": row.quarantined}
            told = {state: count for state, count in told.items() if count}
            if states != told or sum(told.values()) != row.records:
                wrong.append(
                    f"batch {row.id} reports {told} of {row.records} records; they are {states}"
                )
    wrong += [f"records of batch {batch_id}, which is not known" for batch_id in counts]
    return wrong + await _unexplained(found)


async def _unexplained(found: Found) -> list[str]:
    record, error = found.table("importing", "record"), found.table("importing", "error")
    same = and_(error.c.batch_id == record.c.batch_id, error.c.seq == record.c.seq)
    rows = await found.rows(
        "importing",
        select(record.c.batch_id, record.c.line)
        .select_from(record.outerjoin(error, same))
        .where(record.c.state == "quarantined", error.c.seq.is_(None)),
    )
    return [
        f"batch {batch_id} does not say what is wrong in line {line}" for batch_id, line in rows
    ]


@invariant(
    "I7",
    "no column has a value that only a source told which may not change it",
    about=["importing"],
)
async def only_listed_columns_change(found: Found) -> list[str]:
    wrong = [
        f"user {row.ref} has {column} {value!r}, which no source that may change it has told"
        async for row, told in _told(found, "user", UserRecord)
        for column in ("email", "name", "phone", "language")
        if (value := getattr(row, column)) not in told[column]
    ]
    wrong += [
        f"order {row.ref} has {column} {value!r}, which no source that may change it has told"
        async for row, told in _told(found, "order", OrderRecord)
        for column in ("user_ref", "status", "currency", "total")
        if (value := getattr(row, column)) not in told[column]
    ]
    return wrong


_BY_LOGISTICS = {"user": {"phone"}, "order": {"status"}}
_OPTIONAL = {"phone", "language"}


async def _told(
    found: Found, kind: str, record_type: type[UserRecord | OrderRecord]
) -> AsyncGenerator[tuple[Any, dict[str, set[Any]]]]:
    """Each row with the values that applied records told for each column and were allowed to."""
    entity, record = found.table("importing", kind), found.table("importing", "record")
    batch = found.table("importing", "batch")
    applied = and_(record.c.ref == entity.c.ref, record.c.kind == kind, record.c.state == "applied")
    statement = (
        select(*entity.c, batch.c.source.label("told_by"), record.c.body)
        .select_from(
            entity.outerjoin(record, applied).outerjoin(batch, batch.c.id == record.c.batch_id)
        )
        .order_by(entity.c.ref)
    )
    decoder = msgspec.json.Decoder(record_type)
    rows = await found.rows("importing", statement)
    for _, of_one in groupby(rows, key=lambda row: row.ref):
        told: dict[str, set[Any]] = {
            column: {None} if column in _OPTIONAL else set() for column in _columns(kind)
        }
        row: Any = None
        for row in of_one:
            if row.body is None:
                continue
            value = decoder.decode(row.body)
            allowed = _columns(kind) if row.told_by == "crm" else _BY_LOGISTICS[kind]
            for column in allowed:
                told[column].add(getattr(value, column))
        yield row, told


def _columns(kind: str) -> set[str]:
    if kind == "user":
        return {"email", "name", "phone", "language"}
    return {"user_ref", "status", "currency", "total"}
