"""What became of a batch, and whether all that follows from it has come to an end."""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Final

import msgspec
from sqlalchemy import select

from examples.batch_import.importing.tables import Batch, RecordError
from examples.batch_import.reading import reading
from sagacity.backends.sql.tables import dead_letter, outbox, outbox_pending, parked, saga
from sagacity.core.delivery import decode_entry
from sagacity.core.instance import Status, decode_ledger

SETTLED: Final = frozenset({("AccountSaga", "ready")})
"""What has come to its end, although the saga stays for a while in case somebody changes his mind."""


class Quarantine(msgspec.Struct, frozen=True):
    """One record that was not applied, and why."""

    line: int
    kind: str
    ref: str
    fault: str
    reason: str


class BatchReport(msgspec.Struct, frozen=True):
    """A batch as importing sees it; final where `state` is imported or rejected."""

    batch_id: str
    digest: str
    state: str
    source: str
    received_at: datetime
    finished_at: datetime | None
    correlation_id: str
    records: int
    chunks: int
    chunks_applied: int
    applied: int
    stale: int
    quarantined: int
    ignored_fields: Mapping[str, int]
    unknown: Mapping[str, int]
    line: int
    reason: str
    errors: tuple[Quarantine, ...]
    """The first ones, by line."""

    @property
    def finished(self) -> bool:
        return self.state in {"imported", "rejected"}


class Open(msgspec.Struct, frozen=True):
    """Something that has not come to an end yet."""

    service: str
    what: str
    count: int
    waits: bool
    """True where nothing moves before a person or a timeout does something."""


class Convergence(msgspec.Struct, frozen=True):
    """Everything that follows from one batch, over all services."""

    report: BatchReport
    open: tuple[Open, ...]

    @property
    def converged(self) -> bool:
        """Whether nothing of it will happen any more."""
        return self.report.finished and not self.open


class _Header(msgspec.Struct):
    type: str
    correlation_id: str = ""


_header_decoder = msgspec.json.Decoder(_Header)


async def read_report(store: str, batch_id: str, errors: int = 20) -> BatchReport | None:
    """The report of a batch as far as it has come, with the first `errors` records in quarantine."""
    table = Batch.__table__
    async with reading(store) as connection:
        row = (await connection.execute(select(table).where(table.c.id == batch_id))).one_or_none()
        if row is None:
            return None
        found = await connection.execute(
            select(
                RecordError.line,
                RecordError.kind,
                RecordError.ref,
                RecordError.fault,
                RecordError.reason,
            )
            .where(RecordError.batch_id == batch_id)
            .order_by(RecordError.seq)
            .limit(errors)
        )
        return BatchReport(
            batch_id=row.id,
            digest=row.digest,
            state=row.state,
            source=row.source,
            received_at=row.received_at,
            finished_at=row.finished_at,
            correlation_id=row.correlation_id,
            records=row.records,
            chunks=row.chunks,
            chunks_applied=row.chunks_applied,
            applied=row.applied,
            stale=row.stale,
            quarantined=row.quarantined,
            ignored_fields=row.ignored_fields,
            unknown=row.unknown,
            line=row.line,
            reason=row.reason,
            errors=tuple(Quarantine(*error) for error in found),
        )


async def convergence(stores: Mapping[str, str], batch_id: str) -> Convergence | None:
    """Whether all that follows from a batch has ended, and what is open; None for an unknown one."""
    report = await read_report(stores["importing"], batch_id)
    if report is None:
        return None
    open_: list[Open] = []
    for service, url in stores.items():
        open_.extend(await _open_in(service, url, report.correlation_id))
    return Convergence(report, tuple(open_))


async def _open_in(service: str, store: str, correlation_id: str) -> list[Open]:
    moving: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    async with reading(store) as connection:
        alive = (Status.RUNNING.value, Status.COMPENSATING.value, Status.STUCK.value)
        instances = await connection.stream(
            select(saga.c.saga_type, saga.c.state, saga.c.status, saga.c.ledger).where(
                saga.c.status.in_(alive)
            )
        )
        async for saga_type, state, status, ledger in instances:
            known = decode_ledger(ledger)
            if known.correlation_id != correlation_id:
                continue
            resting = status == Status.RUNNING and not known.pending and not known.parked
            if resting and (saga_type, state) in SETTLED:
                continue
            if resting:
                waiting[f"{saga_type} {state}"] += 1
            elif status == Status.STUCK:
                waiting[f"{saga_type} {state}, stuck in compensation"] += 1
            else:
                moving[f"{saga_type} {state}, {status}"] += 1
        held = await connection.stream(select(parked.c.entry))
        async for (entry,) in held:
            envelope = decode_entry(entry)
            if envelope.correlation_id == correlation_id:
                moving[f"{envelope.type} held for a retry or at work"] += 1
        unpublished = await connection.stream(
            select(outbox.c.headers).join(outbox_pending, outbox.c.seq == outbox_pending.c.seq)
        )
        async for (headers,) in unpublished:
            header = _header_decoder.decode(headers)
            if header.correlation_id == correlation_id:
                moving[f"{header.type} that has not left"] += 1
        letters = await connection.stream(
            select(dead_letter.c.entry).where(
                dead_letter.c.replayed_at.is_(None), dead_letter.c.decoded
            )
        )
        async for (entry,) in letters:
            envelope = decode_entry(entry)
            if envelope.correlation_id == correlation_id:
                waiting[f"{envelope.type} dead letter"] += 1
    return [
        *(Open(service, what, count, waits=False) for what, count in sorted(moving.items())),
        *(Open(service, what, count, waits=True) for what, count in sorted(waiting.items())),
    ]
