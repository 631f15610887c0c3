"""What the store suites share: a database to test, two workers on it, and rows to write."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from sagacity.core.delivery import Envelope, encode_entry
from sagacity.core.instance import Instance, Ledger, Status
from sagacity.core.plan import (
    CorrelationRow,
    DeadLetterRow,
    InboxRow,
    Known,
    OutboxRow,
    Outcome,
    ParkedRow,
    Plan,
    TimeoutRow,
    TransitionRow,
)
from sagacity.ports import (
    Clock,
    Inspector,
    Lookup,
    MarkStore,
    OutboxStore,
    PendingRow,
    RetentionStore,
    Store,
    TaskStore,
)
from sagacity.testing.clock import VirtualClock

__all__ = [
    "FullStore",
    "StoreDatabase",
    "Workers",
    "correlation",
    "dead_letter",
    "envelope",
    "inbox",
    "instance",
    "message_ids",
    "outbox",
    "parked",
    "timeout",
    "transition",
    "workers",
]

SECOND = 1_000_000
"""Microseconds."""
LARGEST = 2**63 - 1
"""The largest number a store has to take."""
LOOKALIKES = (
    "Order-A1",
    "order-a1",
    "ORDER-A1",
    "cafe",
    "café",
    "cafe\u0301",
    "id1",
    "id1 ",
    " id1",
    "straße",
    "strasse",
    "0",
    "00",
    "0.0",
    "null",
    "%",
    "_",
    "'; --",
    "\U0001f600",
)
"""Ids that one collation or another takes for equal (protocol.md M8)."""


class FullStore(Store, OutboxStore, TaskStore, RetentionStore, Inspector, MarkStore, Protocol):
    """Every port of a store in one object."""


class StoreDatabase(Protocol):
    """One empty database."""

    serial: bool
    """True where a second transaction begins only after the first has ended."""
    sessions: bool
    """True where `Work.session` is an SQLAlchemy session."""

    def connect(self, clock: Clock) -> FullStore:
        """A store of its own on the database, as another process would have one."""
        ...


class Workers:
    """Two workers on one database, with one clock that stands still."""

    def __init__(self, clock: VirtualClock, first: FullStore, second: FullStore) -> None:
        self.clock, self.first, self.second = clock, first, second

    @property
    def now(self) -> int:
        """The time of both stores."""
        return self.clock.now()

    async def write(self, *, published: Sequence[int] = (), **lists: Any) -> list[PendingRow]:
        """Commits a plan made of these lists on the first store."""
        async with self.first.transaction() as transaction:
            return await transaction.write(Plan(now=transaction.now, **lists), published)

    async def load(self, *keys: str, saga_type: str = "Order") -> dict[str, Instance]:
        """The instances with these keys, by key."""
        async with self.first.transaction() as transaction:
            loaded = await transaction.load({saga_type: keys})
            assert not loaded.busy, f"expected no busy instance, got {loaded.busy}"
            return {key: found for (_, key), found in loaded.instances.items()}

    async def known(self, **asked: Any) -> Known:
        """What the guards know."""
        async with self.first.transaction() as transaction:
            return await transaction.known(**{"inbox": (), **asked})

    async def correlated(
        self, value: str, *, name: str = "user", saga_type: str = "Order"
    ) -> tuple[str, ...]:
        """Keys of the instances that have a value of a further key."""
        async with self.first.transaction() as transaction:
            lookup = Lookup(saga_type=saga_type, name=name, value=value)
            found = await transaction.correlated([lookup])
            assert set(found) <= {lookup}, f"expected only {lookup}, got {found}"
            return found.get(lookup, ())

    async def pending(self) -> list[str]:
        """Message ids of everything that is pending, in order."""
        return message_ids(await self.first.pending(LARGEST, 1_000_000))

    async def is_untouched(self) -> bool:
        """True where the database holds nothing at all that a plan can write."""
        counts = await self.first.counts()
        return not any(counts.values())


@asynccontextmanager
async def workers(database: StoreDatabase) -> AsyncGenerator[Workers]:
    """Two stores that are prepared, and closed at the end."""
    clock = VirtualClock()
    first, second = database.connect(clock), database.connect(clock)
    try:
        await first.prepare(create=True)
        await second.prepare()
        yield Workers(clock, first, second)
    finally:
        await second.close()
        await first.close()


# -------------------------------------------------------------------------------------------- rows


def envelope(id_: str = "m1", **fields: Any) -> Envelope:
    """A small message."""
    values: dict[str, Any] = {"id": id_, "type": "shop.Happened", "topic": "orders"}
    return Envelope(**{**values, **fields})


def instance(key: str = "o1", **fields: Any) -> Instance:
    """A running instance of the type ``Order``."""
    values: dict[str, Any] = {
        "type": "Order",
        "key": key,
        "uid": f"uid-of-{key}"[:60],
        "version": 1,
        "status": Status.RUNNING,
        "state": "waiting",
        "schema_version": 1,
        "data": b"{}",
        "ledger": Ledger(),
        "started_at": 1000,
        "updated_at": 2000,
    }
    return Instance(**{**values, **fields})


def inbox(message_id: str = "m1", consumer: str = "Order") -> InboxRow:
    """A handled message."""
    return InboxRow(consumer, message_id, Outcome.HANDLED)


def outbox(id_: str, lane: str = "", **fields: Any) -> OutboxRow:
    """A message to publish."""
    return OutboxRow(lane, envelope(id_, **fields))


def timeout(name: str = "late", *, key: str = "o1", **fields: Any) -> TimeoutRow:
    """A timeout of an instance."""
    values: dict[str, Any] = {
        "uid": f"uid-of-{key}",
        "name": name,
        "generation": 1,
        "due_at": 5000,
        "saga_type": "Order",
        "saga_key": key,
    }
    return TimeoutRow(**{**values, **fields})


def correlation(value: str, key: str = "o1", **fields: Any) -> CorrelationRow:
    """A further key."""
    values: dict[str, Any] = {
        "saga_type": "Order",
        "name": "user",
        "value": value,
        "saga_key": key,
        "unique": False,
    }
    return CorrelationRow(**{**values, **fields})


def parked(message_id: str = "m1", **fields: Any) -> ParkedRow:
    """A message held for an instance, to be tried again at once."""
    values: dict[str, Any] = {
        "consumer": "Order",
        "message_id": message_id,
        "saga_type": "Order",
        "saga_key": "o1",
        "due_at": 0,
        "attempts": 1,
        "parked_at": 500,
        "reason": "retry",
        "envelope": envelope(message_id),
    }
    return ParkedRow(**{**values, **fields})


def dead_letter(message_id: str = "m1", **fields: Any) -> DeadLetterRow:
    """A message of a saga that nobody tries again."""
    values: dict[str, Any] = {
        "consumer": "Order",
        "message_id": message_id,
        "topic": "orders",
        "message_type": "shop.Happened",
        "reason": "failed",
        "error": "Traceback: it failed",
        "attempts": 8,
        "entry": encode_entry(envelope(message_id)),
        "decoded": True,
        "saga_type": "Order",
        "saga_key": "o1",
        "at": 3000,
    }
    return DeadLetterRow(**{**values, **fields})


def transition(version: int = 1, *, key: str = "o1", **fields: Any) -> TransitionRow:
    """One line of history."""
    values: dict[str, Any] = {
        "uid": f"uid-of-{key}",
        "version": version,
        "saga_type": "Order",
        "saga_key": key,
        "at": 2000 + version,
        "message_id": f"m{version}",
        "message_type": "shop.Happened",
        "handler": "begin",
        "state_from": "",
        "state_to": "waiting",
        "status": "running",
        "correlation_id": "c1",
        "effects": b"{}",
        "entry": encode_entry(envelope(f"m{version}")),
    }
    return TransitionRow(**{**values, **fields})


def message_ids(rows: Sequence[PendingRow]) -> list[str]:
    """The message ids of pending rows, in order."""
    return [row.envelope.id for row in rows]
