"""Outbox rows in the caller's own transaction, with or without an ORM."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import overload
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import InstanceState, Session

from sagacity.backends.sql.executors import CoreExecutor
from sagacity.backends.sql.outbox import append_rows
from sagacity.core.delivery import ID_BYTES_MAX, Envelope, derived_id
from sagacity.core.errors import ConfigurationError
from sagacity.core.messages import Event
from sagacity.core.plan import OutboxRow
from sagacity.ports import PendingRow
from sagacity.recording import (
    Origin,
    RecordedEvent,
    RecordsEvents,
    current_origin,
    envelope_of,
    recorded,
)

__all__ = [
    "append",
    "envelopes",
    "insert_rows",
    "lane_of",
    "new_id",
    "origin_at",
    "recorded_items",
    "subject_of",
    "system_time",
]

Recordable = Event | RecordsEvents
"""An event, or an entity whose pending events are meant (they are drained)."""


def new_id() -> str:
    """A message id: 32 hexadecimal digits that nobody has used before."""
    return uuid4().hex


def system_time() -> int:
    """Microseconds since 1970, UTC, by this machine's clock."""
    return time.time_ns() // 1000


def lane_of(subject: str) -> str:
    """The lane of an entity's events: they leave in the order of their rows. "" is no lane."""
    return subject if len(subject.encode()) <= ID_BYTES_MAX else derived_id(subject)


def subject_of(recorder: RecordsEvents) -> str:
    """``EntityType/key`` of an entity: as it says itself, else by its mapped primary key."""
    state = inspect(recorder, raiseerr=False)
    overridden = type(recorder).event_subject is not RecordsEvents.event_subject
    if overridden or not isinstance(state, InstanceState) or state.identity is None:
        return recorder.event_subject()
    parts = [part.hex() if isinstance(part, bytes) else str(part) for part in state.identity]
    return f"{type(recorder).__name__}/{','.join(parts)}"


def insert_rows(
    connection: Connection, rows: Sequence[OutboxRow], created_at: int
) -> list[PendingRow]:
    """Inserts outbox rows in the connection's transaction; returns them with their numbers.

    Raises ConfigurationError for a connection in autocommit mode.
    """
    if not rows:
        return []
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        raise ConfigurationError(
            "outbox: the connection is in AUTOCOMMIT mode; expected a transaction that holds the events "
            "and the changes they tell of; begin one on a connection without that option"
        )
    return append_rows(CoreExecutor(connection), rows, created_at)


def recorded_items(
    events: Recordable | Iterable[Recordable], subject: str
) -> list[tuple[str, RecordedEvent]]:
    """(subject, event) of everything in `events`; entities are drained."""
    parts: list[RecordsEvents | RecordedEvent] = [
        one if isinstance(one, RecordsEvents) else recorded(one)
        for one in ([events] if isinstance(events, (Event, RecordsEvents)) else events)
    ]
    # Only now, when nothing can be refused any more, are the entities drained.
    items: list[tuple[str, RecordedEvent]] = []
    for part in parts:
        if isinstance(part, RecordsEvents):
            of = subject or subject_of(part)
            items.extend((of, item) for item in part.drain_events())
        else:
            items.append((subject, part))
    return items


@overload
def append(
    target: AsyncSession | AsyncConnection,
    events: Recordable | Iterable[Recordable],
    *,
    origin: Origin | None = None,
    subject: str = "",
) -> Awaitable[list[Envelope]]: ...
@overload
def append(
    target: Session | Connection,
    events: Recordable | Iterable[Recordable],
    *,
    origin: Origin | None = None,
    subject: str = "",
) -> list[Envelope]: ...
def append(
    target: AsyncSession | AsyncConnection | Session | Connection,
    events: Recordable | Iterable[Recordable],
    *,
    origin: Origin | None = None,
    subject: str = "",
) -> Awaitable[list[Envelope]] | list[Envelope]:
    """Adds events to the outbox in the transaction of `target`; they leave after its commit.

    `events` is an event, an entity that records (its pending events are drained), or several of them.
    `subject` is ``EntityType/id``: events of one subject leave in order. `origin` defaults to the one
    of `originating` when they were recorded, else now. Returns the messages; for an async `target` it is to be awaited. Raises
    NotRecordable, before anything is written, for what cannot be encoded.
    """
    items = recorded_items(events, subject)

    def write(on: Session | Connection) -> list[Envelope]:
        hand_over: Callable[..., list[Envelope]] | None = getattr(on, "append_events", None)
        if hand_over is not None:  # a session of ours shows them to its subscribers, too
            return hand_over(items, origin)
        connection = on.connection() if isinstance(on, Session) else on
        made = envelopes(items, lambda item: origin or origin_at(item), new_id)
        insert_rows(connection, made, system_time())
        return [row.envelope for row in made]

    if isinstance(target, (AsyncSession, AsyncConnection)):
        return target.run_sync(write)
    return write(target)


def envelopes(
    items: Iterable[tuple[str, RecordedEvent]],
    origin_of: Callable[[RecordedEvent], Origin],
    new_id: Callable[[], str],
) -> list[OutboxRow]:
    """The outbox rows of (subject, event) pairs; those without a correlation id get one in common."""
    rows: list[OutboxRow] = []
    common = ""
    for subject, item in items:
        message_id, origin = new_id(), origin_of(item)
        if not origin.correlation_id:
            common = common or message_id
            origin = msgspec.structs.replace(origin, correlation_id=common)
        envelope = envelope_of(item, message_id=message_id, origin=origin, subject=subject)
        rows.append(OutboxRow(lane=lane_of(subject), envelope=envelope))
    return rows


def origin_at(item: RecordedEvent) -> Origin:
    """The origin an event was recorded with, or else the one that holds now."""
    return current_origin() if item.origin == Origin() else item.origin
