"""A saga instance as it is kept between two messages.

`Instance` is one row: who it is, where it stands, its data, and its ledger: the commands nobody has
answered yet, what must be undone, what waits, and which timeouts are armed. All of it is a value;
nothing here changes anything in place.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from sagacity.core.delivery import Envelope


class Status(StrEnum):
    """Where an instance stands as a whole; its *state* is the user's own word."""

    RUNNING = "running"
    COMPENSATING = "compensating"
    """Undo commands are under way; forward handling has stopped for good."""
    STUCK = "stuck"
    """An undo failed for good; an operator retries or waives it."""
    COMPLETED = "completed"
    COMPENSATED = "compensated"

    @property
    def finished(self) -> bool:
        """True where nothing more will happen to the instance."""
        return self is Status.COMPLETED or self is Status.COMPENSATED


class PendingCommand(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A command of this instance that nobody has answered yet."""

    id: str
    type: str
    topic: str
    sent_at: int
    undoes: str = ""


class Undoable(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A command that was issued and not refused, with the command that undoes it."""

    command_id: str
    type: str
    topic: str
    undo_type: str
    undo_version: int
    undo_body: bytes
    confirmed: bool = False
    """True once the command was answered with success. An unanswered one is undone all the same."""


class Armed(msgspec.Struct, frozen=True):
    """A timeout that is set: a firing with another generation is stale."""

    generation: int
    due_at: int


class Compensation(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is left to undo, newest last, and the undo commands under way."""

    reason: str
    remaining: tuple[Undoable, ...] = ()
    under_way: dict[str, Undoable] = {}
    """Undo command id -> what it undoes."""
    failed: dict[str, Undoable] = {}
    """Undo command id that failed for good -> what it should have undone."""
    errors: dict[str, str] = {}
    """Undo command id that failed for good -> why."""
    attempt: int = 0
    """How often an operator had the failed ones tried again; part of the undo command ids."""
    waived: dict[str, str] = {}
    """Command id whose undo an operator waived -> the reason given."""


class Ledger(msgspec.Struct, frozen=True, omit_defaults=True):
    """The framework's own memory of an instance."""

    pending: dict[str, PendingCommand] = {}
    """Command id -> command, in the order they were sent."""
    undo: tuple[Undoable, ...] = ()
    """In the order the commands were sent."""
    deferred: tuple[Envelope, ...] = ()
    """Early events, in the order they came."""
    timeouts: dict[str, Armed] = {}
    generation: int = 0
    """Highest timeout generation ever used."""
    keys: dict[str, tuple[str, ...]] = {}
    """Further correlation keys: name -> values."""
    parked: tuple[tuple[str, str], ...] = ()
    """(consumer, message id) held in SQL for this instance: the first one failed, the others wait
    behind it."""
    sequence: dict[str, int] = {}
    """Topic -> number of forward commands sent there."""
    compensation: Compensation | None = None
    correlation_id: str = ""
    actor: str = ""
    hops: int = 0
    """`Envelope.hops` of the message that started it."""
    steps: int = 0
    """How many messages were handled."""


class Instance(msgspec.Struct, frozen=True):
    """One saga instance: a row of the store, or a node of the checker's graph."""

    type: str
    key: str
    uid: str
    """Differs between two instances that had the same key one after the other."""
    version: int
    """Grows by one with every message that changed anything; the fencing token of the row."""
    status: Status
    state: str
    schema_version: int
    data: bytes
    """The saga's annotated fields as JSON: as declared, dict keys and sets sorted."""
    ledger: Ledger
    started_at: int
    updated_at: int


_ledger_encoder = msgspec.msgpack.Encoder()
_ledger_decoder = msgspec.msgpack.Decoder(Ledger)


def encode_ledger(ledger: Ledger) -> bytes:
    """The ledger as bytes, for the store."""
    return _ledger_encoder.encode(ledger)


def decode_ledger(data: bytes) -> Ledger:
    """The ledger a store kept; fields it does not know are left out."""
    return _ledger_decoder.decode(data)
