"""What importing does when it is told to, and when something happened elsewhere that it shows."""

from typing import cast

from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.batch_import.batch_file import FileRefused
from examples.batch_import.importing.applying import CHUNK
from examples.batch_import.importing.applying import apply_chunk as apply_records
from examples.batch_import.importing.staging import discard, stage
from examples.batch_import.importing.statistics import count_batch
from examples.batch_import.importing.tables import Batch, Order, User
from examples.batch_import.messages import (
    ApplyChunk,
    BatchImported,
    BatchRejected,
    BatchStaged,
    ChunkApplied,
    DiscardStaging,
    EmailConfirmed,
    FinishBatch,
    OrderAccountsFailed,
    OrderAccountsReady,
    ReceiveBatch,
    StageBatch,
)
from sagacity import Context, Refused, handles, subscribes
from sagacity.backends.sql.session import SagaSession


class TooEarly(Exception):
    """A chunk before this one is not applied yet; it is tried again later."""


@handles(ReceiveBatch)
async def receive_batch(command: ReceiveBatch, context: Context) -> None:
    """Take note of a file; the same file again changes nothing."""
    session = context.session
    batch = await _new_or_known(session, command, context)
    if batch.digest == command.digest and batch.correlation_id != context.message_id:
        return  # handed in before: its report stands, whatever it is or will be
    if batch.correlation_id != context.message_id and batch.state != "rejected":
        reason = (
            f"batch {command.batch_id} was handed in before with other content; "
            "expected a new id for a new file"
        )
        context.publish(BatchRejected(command.batch_id, 0, reason))
        return
    batch.receive(command.path, command.digest, context.message_id, context.now)


async def _new_or_known(session: AsyncSession, command: ReceiveBatch, context: Context) -> Batch:
    """The batch's row, which is ours to change; of several at once exactly one makes it."""
    sqlite = session.get_bind().dialect.name == "sqlite"
    insert = insert_sqlite if sqlite else insert_postgresql
    await session.execute(
        insert(Batch)
        .values(
            id=command.batch_id,
            digest=command.digest,
            path=command.path,
            received_at=context.now,
            correlation_id=context.message_id,
        )
        .on_conflict_do_nothing()
    )
    return await session.get_one(Batch, command.batch_id, with_for_update=True)


@handles(StageBatch)
async def stage_batch(command: StageBatch, context: Context) -> BatchStaged:
    """Read the file into staging rows, in many small transactions; refuse it as a whole if need be."""
    engine = _engine(context)
    async with AsyncSession(engine) as session:
        known = await session.get_one(Batch, command.batch_id)
    if known.state != "received":
        # Told again after it was done: the answer is the same.
        return BatchStaged(known.id, known.chunks, known.records)
    try:
        staged = await stage(engine, command.batch_id, command.path, known.digest)
    except FileRefused as fault:
        await discard(engine, command.batch_id)
        async with SagaSession(engine) as session, session.begin():
            batch = await session.get_one(Batch, command.batch_id)
            batch.reject(fault.line, fault.reason, context.now)
        raise Refused(str(fault)) from fault
    batch = await context.session.get_one(Batch, command.batch_id)
    batch.source, batch.records, batch.unknown = staged.source, staged.records, staged.unknown
    batch.chunks = -(-staged.records // CHUNK)
    batch.state = "staged"
    return BatchStaged(batch.id, batch.chunks, batch.records)


@handles(ApplyChunk)
async def apply_chunk(command: ApplyChunk, context: Context) -> ChunkApplied:
    """Apply up to 500 records in one transaction; chunks are applied in their order, each once."""
    session = context.session
    batch = await session.get_one(Batch, command.batch_id, with_for_update=True)
    if command.chunk > batch.chunks_applied:
        raise TooEarly(
            f"chunk {command.chunk} of batch {batch.id}: expected chunk {batch.chunks_applied} first"
        )
    if command.chunk == batch.chunks_applied:
        batch.state = "applying"
        await apply_records(session, batch, command.chunk)
        batch.chunks_applied += 1
    return ChunkApplied(batch.id, command.chunk)


@handles(FinishBatch)
async def finish_batch(command: FinishBatch, context: Context) -> BatchImported:
    """Close the report."""
    batch = await context.session.get_one(Batch, command.batch_id, with_for_update=True)
    if batch.state != "imported":
        batch.state, batch.finished_at = "imported", context.now
        await count_batch(context.session, batch, context.now)
    return BatchImported(batch.id, batch.applied, batch.stale, batch.quarantined)


@handles(DiscardStaging)
async def discard_staging(command: DiscardStaging, context: Context) -> None:
    """Forget the staged records of a batch of which nothing was applied."""
    engine = _engine(context)
    async with AsyncSession(engine) as session:
        known = await session.get_one(Batch, command.batch_id)
    if known.state in {"applying", "imported"}:
        raise Refused(f"batch {known.id} is {known.state}; it only goes forward from there")
    await discard(engine, command.batch_id)
    batch = await context.session.get_one(Batch, command.batch_id)
    batch.reject(0, "the file could not be staged", context.now)


@subscribes(EmailConfirmed)
async def email_confirmed(event: EmailConfirmed, context: Context) -> None:
    """Show the confirmation beside the user, if it is about the address he still has."""
    await context.session.execute(
        update(User)
        .where(
            User.ref == event.user_ref,
            User.email == event.email,
            User.email_version <= event.version,  # or he had another one in between
            User.email_state != "confirmed",
        )
        .values(email_state="confirmed", version=User.version + 1)
    )


@subscribes(OrderAccountsReady)
async def accounts_ready(event: OrderAccountsReady, context: Context) -> None:
    """Show beside the order that its accounts exist."""
    await context.session.execute(
        update(Order)
        .where(Order.ref == event.order_ref, Order.accounts_state == "waiting")
        .values(accounts_state="ready", version=Order.version + 1)
    )


@subscribes(OrderAccountsFailed)
async def accounts_failed(event: OrderAccountsFailed, context: Context) -> None:
    """Show beside the order that it has no accounts: the last word, whatever comes late."""
    await context.session.execute(
        update(Order)
        .where(Order.ref == event.order_ref)
        .values(accounts_state=event.outcome, version=Order.version + 1)
    )


def _engine(context: Context) -> AsyncEngine:
    """The database, for transactions beside the one that ends this task."""
    return cast("AsyncEngine", context.session.bind)
