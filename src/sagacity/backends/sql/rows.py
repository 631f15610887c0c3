"""Values of the core as rows of the tables, and back."""

from __future__ import annotations

from typing import Any

from sagacity.codec import decode_envelope, encode_envelope, encode_headers, envelope_from
from sagacity.core.instance import Instance, Status, decode_ledger, encode_ledger
from sagacity.core.plan import (
    CorrelationRow,
    DeadLetterRow,
    InboxRow,
    OutboxRow,
    ParkedRow,
    TimeoutRow,
    TransitionRow,
)
from sagacity.ports import DeadLetter, DueTimeout, PendingRow, SagaRow

Row = tuple[Any, ...]


def lenient(text: str) -> bytes:
    """Text that may be anything, such as a traceback, as bytes; what UTF-8 lacks is escaped."""
    return text.encode(errors="backslashreplace")


# ------------------------------------------------------------------------------------------- sagas

SAGA_COLUMNS = (
    "saga_type",
    "saga_key",
    "uid",
    "version",
    "status",
    "state",
    "schema_version",
    "data",
    "ledger",
    "started_at",
    "updated_at",
)
SAGA_MATCH = ("saga_type", "saga_key", "version")
SAGA_CHANGE = (
    "uid",
    "version",
    "status",
    "state",
    "schema_version",
    "data",
    "ledger",
    "started_at",
    "updated_at",
)


def saga_row(instance: Instance) -> Row:
    """All of an instance, as `SAGA_COLUMNS`."""
    return (
        instance.type,
        instance.key.encode(),
        instance.uid.encode(),
        instance.version,
        instance.status.value,
        instance.state,
        instance.schema_version,
        instance.data,
        encode_ledger(instance.ledger),
        instance.started_at,
        instance.updated_at,
    )


def saga_change(instance: Instance, version_before: int) -> Row:
    """An update, as `SAGA_MATCH` then `SAGA_CHANGE`; a new instance may take a finished one's key."""
    return (
        instance.type,
        instance.key.encode(),
        version_before,
        instance.uid.encode(),
        instance.version,
        instance.status.value,
        instance.state,
        instance.schema_version,
        instance.data,
        encode_ledger(instance.ledger),
        instance.started_at,
        instance.updated_at,
    )


def instance_of(row: Any) -> Instance:
    """The instance of a row of the table `saga`, all columns in their order."""
    (
        saga_type,
        key,
        uid,
        version,
        status,
        state,
        schema_version,
        data,
        ledger,
        started_at,
        updated_at,
    ) = row
    return Instance(
        type=saga_type,
        key=key.decode(),
        uid=uid.decode(),
        version=version,
        status=_STATUS[status],
        state=state,
        schema_version=schema_version,
        data=data,
        ledger=decode_ledger(ledger),
        started_at=started_at,
        updated_at=updated_at,
    )


_STATUS = {status.value: status for status in Status}


def listed(row: Any) -> SagaRow:
    """One line of a list of instances."""
    return SagaRow(
        saga_type=row.saga_type,
        saga_key=row.saga_key.decode(),
        uid=row.uid.decode(),
        version=row.version,
        status=row.status,
        state=row.state,
        started_at=row.started_at,
        updated_at=row.updated_at,
    )


CORRELATION_COLUMNS = ("saga_type", "name", "value", "saga_key", "is_unique")


def correlation_row(row: CorrelationRow) -> Row:
    """A further key, as `CORRELATION_COLUMNS`."""
    return (row.saga_type, row.name, row.value.encode(), row.saga_key.encode(), row.unique)


# ---------------------------------------------------------------------------------------- messages

INBOX_COLUMNS = ("consumer", "message_id", "outcome", "at")


def inbox_row(row: InboxRow, now: int) -> Row:
    """An inbox entry, as `INBOX_COLUMNS`."""
    return (row.consumer.encode(), row.message_id.encode(), row.outcome.value, now)


OUTBOX_COLUMNS = (
    "message_id",
    "message_type",
    "destination",
    "lane",
    "headers",
    "body",
    "created_at",
)


def outbox_row(row: OutboxRow, now: int) -> Row:
    """A message to publish, as `OUTBOX_COLUMNS`."""
    envelope = row.envelope
    return (
        envelope.id.encode(),
        envelope.type,
        envelope.topic,
        row.lane.encode(),
        encode_headers(envelope),
        envelope.body,
        now,
    )


def pending_of(row: Any) -> PendingRow:
    """The pending row of seq, lane, created_at, headers, body."""
    seq, lane, created_at, headers, body = row
    return PendingRow(
        seq=seq,
        lane=lane.decode(),
        created_at=created_at,
        envelope=envelope_from(headers, body),
    )


TIMEOUT_COLUMNS = ("uid", "name", "generation", "due_at", "saga_type", "saga_key")


def timeout_row(row: TimeoutRow) -> Row:
    """An armed timeout, as `TIMEOUT_COLUMNS`."""
    return (
        row.uid.encode(),
        row.name.encode(),
        row.generation,
        row.due_at,
        row.saga_type,
        row.saga_key.encode(),
    )


def due_timeout_of(row: Any) -> DueTimeout:
    """The timeout of a row of the table `timeout`."""
    return DueTimeout(
        uid=row.uid.decode(),
        name=row.name.decode(),
        generation=row.generation,
        due_at=row.due_at,
        saga_type=row.saga_type,
        saga_key=row.saga_key.decode(),
    )


PARKED_COLUMNS = (
    "consumer",
    "message_id",
    "saga_type",
    "saga_key",
    "lane",
    "sequence",
    "due_at",
    "attempts",
    "parked_at",
    "reason",
    "error",
    "entry",
    "undoes",
)


def parked_row(row: ParkedRow) -> Row:
    """A message held in SQL, as `PARKED_COLUMNS`."""
    return (
        row.consumer.encode(),
        row.message_id.encode(),
        row.saga_type,
        row.saga_key.encode(),
        row.lane.encode(),
        row.sequence,
        row.due_at,
        row.attempts,
        row.parked_at,
        row.reason,
        lenient(row.error),
        encode_envelope(row.envelope),
        row.envelope.undoes.encode(),
    )


def parked_of(row: Any) -> ParkedRow:
    """The value of a row of the table `parked`."""
    return ParkedRow(
        consumer=row.consumer.decode(),
        message_id=row.message_id.decode(),
        saga_type=row.saga_type,
        saga_key=row.saga_key.decode(),
        lane=row.lane.decode(),
        sequence=row.sequence,
        due_at=row.due_at,
        attempts=row.attempts,
        parked_at=row.parked_at,
        reason=row.reason,
        error=row.error.decode(),
        envelope=decode_envelope(row.entry),
    )


# ----------------------------------------------------------------------------------------- records

DEAD_LETTER_COLUMNS = (
    "consumer",
    "message_id",
    "topic",
    "message_type",
    "reason",
    "error",
    "attempts",
    "entry",
    "decoded",
    "saga_type",
    "saga_key",
    "lane",
    "sequence",
    "at",
)


def dead_letter_row(row: DeadLetterRow) -> Row:
    """A dead letter, as `DEAD_LETTER_COLUMNS`."""
    return (
        row.consumer.encode(),
        row.message_id.encode(),
        lenient(row.topic),
        lenient(row.message_type),
        row.reason,
        lenient(row.error),
        row.attempts,
        row.entry,
        row.decoded,
        row.saga_type,
        row.saga_key.encode(),
        row.lane.encode(),
        row.sequence,
        row.at,
    )


def dead_letter_of(row: Any) -> DeadLetter:
    """The value of a row of the table `dead_letter`."""
    return DeadLetter(
        id=row.id,
        row=DeadLetterRow(
            consumer=row.consumer.decode(),
            message_id=row.message_id.decode(),
            topic=row.topic.decode(),
            message_type=row.message_type.decode(),
            reason=row.reason,
            error=row.error.decode(),
            attempts=row.attempts,
            entry=row.entry,
            decoded=row.decoded,
            saga_type=row.saga_type,
            saga_key=row.saga_key.decode(),
            lane=row.lane.decode(),
            sequence=row.sequence,
            at=row.at,
        ),
        replayed_at=row.replayed_at,
    )


TRANSITION_COLUMNS = (
    "uid",
    "version",
    "saga_type",
    "saga_key",
    "at",
    "message_id",
    "message_type",
    "handler",
    "state_from",
    "state_to",
    "status",
    "correlation_id",
    "effects",
    "entry",
)


def transition_row(row: TransitionRow) -> Row:
    """One line of history, as `TRANSITION_COLUMNS`."""
    return (
        row.uid.encode(),
        row.version,
        row.saga_type,
        row.saga_key.encode(),
        row.at,
        row.message_id.encode(),
        row.message_type,
        row.handler,
        row.state_from,
        row.state_to,
        row.status,
        row.correlation_id.encode(),
        row.effects,
        row.entry,
    )


def transition_of(row: Any) -> TransitionRow:
    """The value of a row of the table `transition`."""
    return TransitionRow(
        uid=row.uid.decode(),
        version=row.version,
        saga_type=row.saga_type,
        saga_key=row.saga_key.decode(),
        at=row.at,
        message_id=row.message_id.decode(),
        message_type=row.message_type,
        handler=row.handler,
        state_from=row.state_from,
        state_to=row.state_to,
        status=row.status,
        correlation_id=row.correlation_id.decode(),
        effects=row.effects,
        entry=row.entry,
    )
