"""What operators ask a memory store, and what its janitor deletes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import msgspec

from sagacity.backends.memory.tables import Parked, Tables
from sagacity.core.delivery import decode_entry
from sagacity.core.errors import ConfigurationError
from sagacity.core.instance import Status
from sagacity.core.plan import DeadLetterRow, OutboxRow, ParkedRow, TransitionRow
from sagacity.ports import DeadLetter, Retention, SagaRow

_K = TypeVar("_K", bound=Hashable)


def list_sagas(
    tables: Tables, *, saga_type: str, status: str, state: str, limit: int, after: str
) -> list[SagaRow]:
    """Instances, the ones that have not moved for longest first; see `Inspector.sagas`."""
    start = _place_of(after) if after else None
    rows = [
        SagaRow(
            saga_type=one.type,
            saga_key=one.key,
            uid=one.uid,
            version=one.version,
            status=one.status.value,
            state=one.state,
            started_at=one.started_at,
            updated_at=one.updated_at,
        )
        for one in tables.sagas.values()
        if saga_type in ("", one.type)
        and status in ("", one.status.value)
        and state in ("", one.state)
        and (start is None or (one.updated_at, one.type, one.key.encode()) > start)
    ]
    rows.sort(key=lambda row: (row.updated_at, row.saga_type, row.saga_key.encode()))
    return rows[:limit]


def _place_of(cursor: str) -> tuple[int, str, bytes]:
    at, _, place = cursor.partition(" ")
    saga_type, _, key = place.partition(" ")
    if not at.isdecimal() or not key:
        raise ConfigurationError(
            f"list of sagas: expected `after` to be the cursor of a row, got {cursor!r:.80}"
        )
    return int(at), saga_type, key.encode()


def history(tables: Tables, saga_type: str, saga_key: str) -> list[TransitionRow]:
    """Transitions of the instance that has the key now, or had it last; oldest first."""
    rows = [r for r in tables.transitions if (r.saga_type, r.saga_key) == (saga_type, saga_key)]
    if not rows:
        return []
    instance = tables.sagas.get((saga_type, saga_key))
    uid = instance.uid if instance is not None else rows[-1].uid
    return sorted((row for row in rows if row.uid == uid), key=lambda row: row.version)


def list_dead_letters(tables: Tables, consumer: str, limit: int) -> list[DeadLetter]:
    """Dead letters that were not replayed, newest first."""
    letters = [
        letter
        for letter in tables.dead_letters.values()
        if letter.replayed_at is None and consumer in ("", letter.row.consumer)
    ]
    letters.sort(key=lambda letter: (letter.row.at, letter.id), reverse=True)
    return letters[:limit]


def replay(tables: Tables, ids: Sequence[int], now: int) -> int:
    """Parks dead letters again, due at once; see `Inspector.replay`."""
    parked = 0
    for id_ in sorted(set(ids)):
        letter = tables.dead_letters.get(id_)
        if letter is None or letter.replayed_at is not None or not letter.row.decoded:
            continue
        tables.dead_letters[id_] = msgspec.structs.replace(letter, replayed_at=now)
        row = letter.row
        if row.unrouted:
            _publish_again(tables, row, now)
            parked += 1
            continue
        if (row.consumer, row.message_id) in tables.parked:
            continue
        again = ParkedRow(
            consumer=row.consumer,
            message_id=row.message_id,
            saga_type=row.saga_type,
            saga_key=row.saga_key,
            lane=row.lane,
            sequence=row.sequence,
            due_at=now,
            attempts=0,
            parked_at=now,
            reason="retry" if row.saga_type else "work",
            error=row.error,
            envelope=decode_entry(row.entry),
        )
        tables.park(Parked(again))
        parked += 1
    return parked


def _publish_again(tables: Tables, row: DeadLetterRow, now: int) -> None:
    """Sends a message once more over the bus, and forgets that it was seen."""
    tables.inbox.pop((row.consumer, row.message_id), None)
    tables.send(tables.fresh([OutboxRow("", decode_entry(row.entry))], now))
    # What came out of this outbox is there, and has left long ago.
    tables.mark_pending(
        seq
        for seq, sent in tables.outbox.items()
        if sent.envelope.id == row.message_id and seq not in tables.pending
    )


def counts(tables: Tables, now: int) -> dict[str, int]:
    """Rows that matter to an operator; see `Inspector.counts`."""
    found = {f"sagas.{status.value}": 0 for status in Status}
    for one in tables.sagas.values():
        found[f"sagas.{one.status.value}"] += 1
    found["outbox.pending"] = len(tables.pending)
    found["timeouts"] = len(tables.timeouts)
    found["dead_letters"] = sum(d.replayed_at is None for d in tables.dead_letters.values())
    found["parked"] = len(tables.parked)
    for consumer, rows in tables.parked_for.items():
        # "type#key" names one of many instances; the figure is for the type.
        name = f"parked.{consumer.partition('#')[0]}"
        found[name] = found.get(name, 0) + len(rows)
    ages = [now - tables.outbox[seq].created_at for seq in tables.pending]
    found["outbox.oldest_us"] = max(0, *ages) if ages else 0
    return found


# --- janitor -------------------------------------------------------------------------------------


def clean(tables: Tables, retention: Retention, now: int, limit: int) -> int:
    """Deletes up to `limit` rows of each kind that are older; see `RetentionStore.clean`.

    Lanes and tombstones live as long as the inbox: what they guard against is a late copy.
    """
    inbox_end, outbox_end = now - retention.inbox_us, now - retention.outbox_us
    gone = 0
    end = now - retention.finished_us
    old_sagas = [
        key for key, one in tables.sagas.items() if one.status.finished and one.updated_at < end
    ]
    for key in old_sagas[:limit]:
        tables.drop_keys(key)
    gone += _delete(tables.sagas, old_sagas[:limit])
    gone += _delete(tables.past_keys, _older(tables.past_keys, lambda at: at, inbox_end, limit))
    gone += _delete(tables.inbox, _older(tables.inbox, lambda row: row.at, inbox_end, limit))
    sent = {seq: row for seq, row in tables.outbox.items() if seq not in tables.pending}
    old_sent = _older(sent, lambda row: row.created_at, outbox_end, limit)
    tables.message_ids -= {tables.outbox[seq].envelope.id for seq in old_sent}
    gone += _delete(tables.outbox, old_sent)
    gone += _delete(
        tables.tombstones, _older(tables.tombstones, lambda row: row.at, inbox_end, limit)
    )
    idle = {
        name: lane
        for name, lane in tables.lanes.items()
        if name not in tables.parked_in and lane.lease_until <= now
    }
    gone += _delete(tables.lanes, _older(idle, lambda row: row.at, inbox_end, limit))
    end = now - retention.dead_letters_us
    gone += _delete(
        tables.dead_letters, _older(tables.dead_letters, lambda d: d.row.at, end, limit)
    )
    by_place = dict(enumerate(tables.transitions))
    old = _older(by_place, lambda row: row.at, now - retention.history_us, limit)
    gone += _delete(by_place, old)
    tables.transitions = list(by_place.values())
    return gone


_V = TypeVar("_V")


def _older(rows: dict[_K, _V], at: Callable[[_V], int], end: int, limit: int) -> list[_K]:
    old = sorted((key for key, row in rows.items() if at(row) < end), key=lambda k: at(rows[k]))
    return old[:limit]


def _delete(rows: dict[_K, _V], keys: Iterable[_K]) -> int:
    before = len(rows)
    for key in keys:
        del rows[key]
    return before - len(rows)
