"""The tables of the SQL store, as SQLAlchemy metadata.

Ids, keys, consumers and lanes are bytes (UTF-8), so that no collation can ever merge two of them;
statuses and type names are text; times are microseconds since 1970 in UTC. Applications that
generate their migrations with Alembic add `metadata` to their ``target_metadata``.

Each small table that is polled (`outbox_pending`, `timeout`, `parked`) holds only what is still
to be done, so a poll costs the same whatever the history.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    event,
    literal_column,
    text,
)
from sqlalchemy.types import TypeEngine

PREFIX = "sagacity_"
"""Every table name begins with it."""

SCHEMA_VERSION = 1
"""Version of these tables that this code expects; see `migrations`."""

metadata = MetaData()

# SQLite counts up by itself only in a column declared INTEGER, which holds 64 bits there.
_Serial = BigInteger().with_variant(Integer, "sqlite")


def _bytes(name: str) -> Column[bytes]:
    return Column(name, LargeBinary, nullable=False)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _int(name: str, type_: TypeEngine[int] | type[TypeEngine[int]] = BigInteger) -> Column[int]:
    return Column(name, type_, nullable=False)


def _serial(name: str) -> Column[int]:
    return Column(name, _Serial, Identity(), primary_key=True)


saga = Table(
    f"{PREFIX}saga",
    metadata,
    _text("saga_type"),
    _bytes("saga_key"),
    _bytes("uid"),
    _int("version"),
    _text("status"),
    _text("state"),
    _int("schema_version", Integer),
    _bytes("data"),
    _bytes("ledger"),
    _int("started_at"),
    _int("updated_at"),
    PrimaryKeyConstraint("saga_type", "saga_key"),
    Index(f"{PREFIX}saga_by_status", "status", "updated_at"),
)
"""One row for each instance; a finished one stays until its retention ends."""

correlation = Table(
    f"{PREFIX}correlation",
    metadata,
    _text("saga_type"),
    _text("name"),
    _bytes("value"),
    _bytes("saga_key"),
    Column("is_unique", Boolean, nullable=False),
    PrimaryKeyConstraint("saga_type", "name", "value", "saga_key"),
    Index(f"{PREFIX}correlation_by_key", "saga_type", "saga_key"),
    sqlite_with_rowid=False,
)
"""Further keys of instances."""

correlation_past = Table(
    f"{PREFIX}correlation_past",
    metadata,
    _text("saga_type"),
    _text("name"),
    _bytes("value"),
    _int("at"),
    PrimaryKeyConstraint("saga_type", "name", "value"),
    Index(f"{PREFIX}correlation_past_by_time", "at"),
    sqlite_with_rowid=False,
)
"""Further keys that finished instances had: events that look for them are late, not early."""

Index(
    f"{PREFIX}correlation_unique",
    correlation.c.saga_type,
    correlation.c.name,
    correlation.c.value,
    unique=True,
    postgresql_where=text("is_unique"),
    sqlite_where=text("is_unique"),
)

inbox = Table(
    f"{PREFIX}inbox",
    metadata,
    _bytes("consumer"),
    _bytes("message_id"),
    _text("outcome"),
    _int("at"),
    PrimaryKeyConstraint("consumer", "message_id"),
    Index(f"{PREFIX}inbox_by_time", "at"),
    sqlite_with_rowid=False,
)
"""What each consumer has taken responsibility for."""

outbox = Table(
    f"{PREFIX}outbox",
    metadata,
    _serial("seq"),
    _bytes("message_id"),
    _text("message_type"),
    _text("destination"),
    _bytes("lane"),
    _bytes("headers"),
    _bytes("body"),
    _int("created_at"),
    UniqueConstraint("message_id", name=f"{PREFIX}outbox_message_id"),
    Index(f"{PREFIX}outbox_by_time", "created_at"),
    sqlite_autoincrement=True,
)
"""Every message that left or will leave: `headers` is the envelope without its body, as JSON."""

outbox_pending = Table(
    f"{PREFIX}outbox_pending",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=False),
    _bytes("lane"),
    _int("created_at"),
    Index(f"{PREFIX}outbox_pending_by_lane", "lane", "seq"),
    Index(f"{PREFIX}outbox_pending_by_time", "created_at"),
)
"""The outbox rows that the bus has not acknowledged; small and hot."""

timeout = Table(
    f"{PREFIX}timeout",
    metadata,
    _bytes("uid"),
    _bytes("name"),
    _int("generation"),
    _int("due_at"),
    _text("saga_type"),
    _bytes("saga_key"),
    PrimaryKeyConstraint("uid", "name"),
    Index(f"{PREFIX}timeout_due", "due_at", "saga_type"),
)
"""Armed timeouts."""

parked = Table(
    f"{PREFIX}parked",
    metadata,
    _bytes("consumer"),
    _bytes("message_id"),
    _text("saga_type"),
    _bytes("saga_key"),
    _bytes("lane"),
    _int("sequence"),
    Column("due_at", BigInteger),
    _int("attempts", Integer),
    _int("parked_at"),
    _text("reason"),
    _bytes("error"),
    _bytes("entry"),
    _bytes("undoes"),
    Column("token", LargeBinary, nullable=False, server_default=text("''")),
    Column("lease_until", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("consumer", "message_id"),
    Index(f"{PREFIX}parked_by_lane", "lane", "sequence"),
)
"""Messages held in SQL; `entry` is the envelope as msgpack."""

IS_WORK = parked.c.reason == literal_column("'work'")
"""Participants' rows. A literal, not a parameter: only then can a plan use the partial index."""
IS_OF_SAGA = parked.c.reason != literal_column("'work'")

Index(
    f"{PREFIX}parked_due",
    parked.c.due_at,
    parked.c.saga_type,
    postgresql_where=IS_OF_SAGA,
    sqlite_where=IS_OF_SAGA,
)
Index(
    f"{PREFIX}parked_work",
    parked.c.consumer,
    parked.c.due_at,
    postgresql_where=IS_WORK,
    sqlite_where=IS_WORK,
)

lane = Table(
    f"{PREFIX}lane",
    metadata,
    _bytes("lane"),
    _int("next_sequence"),
    _bytes("token"),
    _int("lease_until"),
    _int("at"),
    PrimaryKeyConstraint("lane"),
    Index(f"{PREFIX}lane_by_time", "at"),
)
"""One row for each lane of participants' work: what is next, and who works on it until when."""

tombstone = Table(
    f"{PREFIX}tombstone",
    metadata,
    _bytes("command_id"),
    _bytes("consumer"),
    _int("at"),
    PrimaryKeyConstraint("command_id"),
    Index(f"{PREFIX}tombstone_by_time", "at"),
)
"""Commands whose undo is done; `consumer` is the one that did it."""

dead_letter = Table(
    f"{PREFIX}dead_letter",
    metadata,
    _serial("id"),
    _bytes("consumer"),
    _bytes("message_id"),
    _bytes("topic"),
    _bytes("message_type"),
    _text("reason"),
    _bytes("error"),
    _int("attempts", Integer),
    _bytes("entry"),
    Column("decoded", Boolean, nullable=False),
    _text("saga_type"),
    _bytes("saga_key"),
    _bytes("lane"),
    _int("sequence"),
    _int("at"),
    Column("replayed_at", BigInteger),
    Index(f"{PREFIX}dead_letter_by_time", "at"),
    sqlite_autoincrement=True,
)
"""Messages that nobody tries again by himself; type and topic may be anything that arrived."""

transition = Table(
    f"{PREFIX}transition",
    metadata,
    _serial("seq"),
    _bytes("uid"),
    _int("version"),
    _text("saga_type"),
    _bytes("saga_key"),
    _int("at"),
    _bytes("message_id"),
    _text("message_type"),
    _text("handler"),
    _text("state_from"),
    _text("state_to"),
    _text("status"),
    _bytes("correlation_id"),
    _bytes("effects"),
    _bytes("entry"),
    Index(f"{PREFIX}transition_by_saga", "saga_type", "saga_key", "uid", "version"),
    Index(f"{PREFIX}transition_by_time", "at"),
)
"""The history of every instance."""

publish_mark = Table(
    f"{PREFIX}publish_mark",
    metadata,
    _text("topic"),
    _int("at"),
    _bytes("entry_id"),
    _int("max_seq"),
    PrimaryKeyConstraint("topic", "at"),
)
"""How far the bus was known to be at a time; for finding out what a wiped bus has lost."""

meta = Table(
    f"{PREFIX}meta",
    metadata,
    _text("name"),
    _bytes("value"),
    PrimaryKeyConstraint("name"),
)
"""Facts about the database itself, such as the version of its tables."""


# ------------------------------------------------------------------------------ storage of hot tables


def _stored(table: Table, settings: str) -> None:
    """PostgreSQL: room for updates on each page, and vacuum long before the table is a fifth dead."""
    change: DDL = DDL(  # type: ignore[no-untyped-call]
        f"ALTER TABLE {table.name} SET ({settings})"
    )
    event.listen(table, "after_create", change.execute_if(dialect="postgresql"))


_stored(saga, "fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05")
_stored(parked, "fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05")
_stored(lane, "fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05")
_stored(
    outbox_pending,
    "fillfactor = 70, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 1000",
)
