"""What a memory store holds: the tables of a database as plain values, and indexes over them.

The values are what counts: `Tables.rows` gives all of them in one canonical order, `Tables.of` makes
tables of them again. The indexes follow from the values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from sagacity.core.delivery import Envelope
from sagacity.core.instance import Instance
from sagacity.core.plan import (
    CorrelationRow,
    DeadLetterRow,
    OutboxRow,
    Outcome,
    ParkedRow,
    TimeoutRow,
    TransitionRow,
)
from sagacity.ports import DeadLetter, Mark, PendingRow

Key = tuple[str, str]
"""(saga_type, saga_key), (consumer, message_id) or (uid, name)."""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """A row of the inbox."""

    outcome: Outcome
    at: int


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """A row of the outbox."""

    lane: str
    created_at: int
    envelope: Envelope


class Parked(msgspec.Struct, frozen=True, array_like=True):
    """A parked message, and the lease of whoever works on it."""

    row: ParkedRow
    token: str = ""
    lease_until: int = 0


class Lane(msgspec.Struct, frozen=True, array_like=True):
    """A lane of participants' work: what is next, and until when somebody works on it."""

    next_sequence: int
    lease_until: int
    at: int


class Tombstone(msgspec.Struct, frozen=True, array_like=True):
    """A command whose undo is done."""

    consumer: str
    at: int


class Rows(msgspec.Struct, array_like=True):
    """All rows of all tables, each table in the order of its keys."""

    last_seq: int
    last_letter: int
    last_token: int
    epoch: str
    identity: str
    sagas: list[Instance]
    inbox: list[tuple[Key, Seen]]
    correlations: list[CorrelationRow]
    past_keys: list[tuple[tuple[str, str, str], int]]
    outbox: list[tuple[int, Sent]]
    pending: list[int]
    timeouts: list[TimeoutRow]
    parked: list[Parked]
    lanes: list[tuple[str, Lane]]
    tombstones: list[tuple[str, Tombstone]]
    dead_letters: list[DeadLetter]
    transitions: list[TransitionRow]
    marks: list[Mark]


class Tables:
    """The rows of a store by their keys. Its methods keep the indexes right; none of them waits."""

    def __init__(self) -> None:
        self.last_seq = 0
        self.last_letter = 0
        self.last_token = 0
        self.epoch, self.identity = "", ""
        """Of the bus, as it was last seen."""
        self.sagas: dict[Key, Instance] = {}
        self.inbox: dict[Key, Seen] = {}
        self.correlations: defaultdict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
        """(saga_type, name, value) -> saga_key -> whether it is unique."""
        self.past_keys: dict[tuple[str, str, str], int] = {}
        """(saga_type, name, value) that finished instances had -> when."""
        self.outbox: dict[int, Sent] = {}
        self.pending: dict[int, None] = {}
        """Numbers of the outbox rows that the bus has not acknowledged."""
        self.timeouts: dict[Key, TimeoutRow] = {}
        self.parked: dict[Key, Parked] = {}
        self.lanes: dict[str, Lane] = {}
        self.tombstones: dict[str, Tombstone] = {}
        self.dead_letters: dict[int, DeadLetter] = {}
        self.transitions: list[TransitionRow] = []
        self.marks: dict[tuple[str, int], Mark] = {}
        """(topic, at) -> mark."""
        # Indexes.
        self.message_ids: set[str] = set()
        """Ids in the outbox."""
        self.pending_of: defaultdict[str, dict[int, None]] = defaultdict(dict)
        """Lane -> its pending rows."""
        self.keys_of: defaultdict[Key, set[tuple[str, str, str]]] = defaultdict(set)
        """(saga_type, saga_key) -> its further keys."""
        self.parked_for: defaultdict[str, dict[Key, None]] = defaultdict(dict)
        """Consumer -> its parked rows."""
        self.parked_in: defaultdict[str, dict[Key, None]] = defaultdict(dict)
        """Lane -> the parked rows in it."""

    # --- all of it ------------------------------------------------------------------------------

    def rows(self) -> Rows:
        """Every row, in canonical order: equal content gives equal rows."""
        return Rows(
            last_seq=self.last_seq,
            last_letter=self.last_letter,
            last_token=self.last_token,
            epoch=self.epoch,
            identity=self.identity,
            sagas=[self.sagas[key] for key in sorted(self.sagas)],
            inbox=sorted(self.inbox.items(), key=lambda item: item[0]),
            correlations=[
                CorrelationRow(*place, saga_key=saga_key, unique=unique)
                for place, owners in sorted(self.correlations.items())
                for saga_key, unique in sorted(owners.items())
            ],
            past_keys=sorted(self.past_keys.items()),
            outbox=sorted(self.outbox.items(), key=lambda item: item[0]),
            pending=sorted(self.pending),
            timeouts=[self.timeouts[key] for key in sorted(self.timeouts)],
            parked=[self.parked[key] for key in sorted(self.parked)],
            lanes=sorted(self.lanes.items(), key=lambda item: item[0]),
            tombstones=sorted(self.tombstones.items(), key=lambda item: item[0]),
            dead_letters=[self.dead_letters[key] for key in sorted(self.dead_letters)],
            transitions=list(self.transitions),
            marks=[self.marks[key] for key in sorted(self.marks)],
        )

    @classmethod
    def of(cls, rows: Rows) -> Tables:
        """Tables that hold these rows."""
        tables = cls()
        tables.last_seq, tables.last_letter = rows.last_seq, rows.last_letter
        tables.last_token = rows.last_token
        tables.epoch, tables.identity = rows.epoch, rows.identity
        tables.sagas = {(one.type, one.key): one for one in rows.sagas}
        tables.inbox = dict(rows.inbox)
        for row in rows.correlations:
            tables.correlate(row)
        tables.past_keys = dict(rows.past_keys)
        tables.outbox = dict(rows.outbox)
        tables.message_ids = {sent.envelope.id for sent in tables.outbox.values()}
        tables.mark_pending(rows.pending)
        tables.timeouts = {(row.uid, row.name): row for row in rows.timeouts}
        for parked in rows.parked:
            tables.park(parked)
        tables.lanes, tables.tombstones = dict(rows.lanes), dict(rows.tombstones)
        tables.dead_letters = {letter.id: letter for letter in rows.dead_letters}
        tables.transitions = list(rows.transitions)
        tables.marks = {(mark.topic, mark.at): mark for mark in rows.marks}
        return tables

    # --- outbox ---------------------------------------------------------------------------------

    def fresh(self, rows: Iterable[OutboxRow], now: int) -> list[PendingRow]:
        """Pending rows for those messages whose ids are not in the outbox, with new numbers.

        Takes the numbers, but writes nothing: `send` does.
        """
        fresh: list[PendingRow] = []
        ids: set[str] = set()
        for row in rows:
            id_ = row.envelope.id
            if id_ in self.message_ids or id_ in ids:
                continue
            ids.add(id_)
            self.last_seq += 1
            fresh.append(
                PendingRow(seq=self.last_seq, lane=row.lane, created_at=now, envelope=row.envelope)
            )
        return fresh

    def send(self, rows: Iterable[PendingRow]) -> None:
        """Writes rows of `fresh`."""
        for row in rows:
            self.outbox[row.seq] = Sent(row.lane, row.created_at, row.envelope)
            self.message_ids.add(row.envelope.id)
            self.mark_pending([row.seq])

    def mark_pending(self, seqs: Iterable[int]) -> None:
        """Makes outbox rows pending."""
        for seq in seqs:
            self.pending[seq] = None
            self.pending_of[self.outbox[seq].lane][seq] = None

    def forget(self, seqs: Iterable[int]) -> None:
        """Makes outbox rows pending no more; one that is not is no error."""
        for seq in seqs:
            if self.pending.pop(seq, self) is None:
                lane = self.outbox[seq].lane
                del self.pending_of[lane][seq]
                if not self.pending_of[lane]:
                    del self.pending_of[lane]

    def prefix(self, own: list[PendingRow], forgotten: Iterable[int] = ()) -> list[PendingRow]:
        """`own`, and the pending rows of its lanes that are not `forgotten`, in order.

        A lane's older rows come along because nobody may publish a row before them.
        """
        rows = {row.seq: row for row in own}
        for lane in {row.lane for row in own if row.lane}:
            rows.update((seq, self.pending_row(seq)) for seq in self.pending_of.get(lane, ()))
        for seq in forgotten:
            rows.pop(seq, None)
        return [rows[seq] for seq in sorted(rows)]

    def pending_row(self, seq: int) -> PendingRow:
        """An outbox row as the relay sees it."""
        sent = self.outbox[seq]
        return PendingRow(
            seq=seq, lane=sent.lane, created_at=sent.created_at, envelope=sent.envelope
        )

    # --- parked ---------------------------------------------------------------------------------

    def park(self, parked: Parked) -> None:
        """Writes a parked row, new or changed."""
        row = parked.row
        key = (row.consumer, row.message_id)
        self.parked[key] = parked
        self.parked_for[row.consumer][key] = None
        if row.lane:
            self.parked_in[row.lane][key] = None

    def unpark(self, key: Key) -> Parked:
        """Deletes a parked row."""
        parked = self.parked.pop(key)
        _drop(self.parked_for, parked.row.consumer, key)
        if parked.row.lane:
            _drop(self.parked_in, parked.row.lane, key)
        return parked

    # --- instances ------------------------------------------------------------------------------

    def correlate(self, row: CorrelationRow) -> None:
        """Writes a further key; a known one stays as it is."""
        place = (row.saga_type, row.name, row.value)
        self.correlations[place].setdefault(row.saga_key, row.unique)
        self.keys_of[row.saga_type, row.saga_key].add(place)

    def drop_keys(self, key: Key) -> None:
        """Deletes the further keys of an instance."""
        for place in self.keys_of.pop(key, ()):
            owners = self.correlations[place]
            del owners[key[1]]
            if not owners:
                del self.correlations[place]

    def bury(self, row: DeadLetterRow) -> None:
        """Writes a dead letter."""
        self.last_letter += 1
        self.dead_letters[self.last_letter] = DeadLetter(
            id=self.last_letter, row=row, replayed_at=None
        )


def _drop(index: defaultdict[str, dict[Key, None]], name: str, key: Key) -> None:
    del index[name][key]
    if not index[name]:
        del index[name]
