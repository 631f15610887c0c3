"""Participants' work: handing parked messages out under leases, lane by lane, and ending them."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec

from sagacity.backends.memory.tables import Key, Lane, Parked, Tables, Tombstone
from sagacity.backends.memory.writing import fit_letter, lenient
from sagacity.core.plan import ParkedRow
from sagacity.ports import Finish, Task

WORK = "work"


def claim(
    tables: Tables, consumers: Mapping[str, int], now: int, lease_us: int, gap_us: int
) -> list[Task]:
    """Leases what is ready, at most one of each lane; see `TaskStore.claim`."""
    token, until = f"lease-{tables.last_token + 1}", now + lease_us
    tasks: list[Task] = []
    for consumer, most in consumers.items():
        taken = 0
        for key in _by_age(tables, consumer, now) if most > 0 else ():
            if taken >= most:
                break
            parked = tables.parked[key]
            if not _its_turn(tables, parked, now, gap_us):
                continue
            row = _lease(tables, key, token, until, now)
            tombstone = row.message_id in tables.tombstones
            tasks.append(Task(row=row, token=token, lease_until=until, tombstone=tombstone))
            taken += 1
    if tasks:
        tables.last_token += 1
    return tasks


def _by_age(tables: Tables, consumer: str, now: int) -> Iterator[Key]:
    """Due and unleased rows of a consumer, oldest first; undo commands before others of their time."""
    heap: list[tuple[int, bool, int, Key]] = []
    for key in tables.parked_for.get(consumer, ()):
        parked = tables.parked[key]
        row = parked.row
        if (
            row.reason == WORK
            and row.due_at is not None
            and row.due_at <= now >= parked.lease_until
        ):
            heap.append((row.due_at, not row.envelope.undoes, row.sequence, key))
    heapq.heapify(heap)
    while heap:
        yield heapq.heappop(heap)[3]


def _its_turn(tables: Tables, parked: Parked, now: int, gap_us: int) -> bool:
    row = parked.row
    if not row.lane:
        return True
    lane = tables.lanes.get(row.lane)
    if lane is not None and lane.lease_until > now:
        return False
    if row.envelope.undoes or row.sequence == 0:
        return True
    others = (tables.parked[key].row for key in tables.parked_in[row.lane])
    if any(
        0 < other.sequence < row.sequence and other.reason == WORK and not other.envelope.undoes
        for other in others
    ):
        return False
    expected = lane.next_sequence if lane is not None else 1
    return row.sequence <= expected or row.parked_at <= now - gap_us


def _lease(tables: Tables, key: Key, token: str, until: int, now: int) -> ParkedRow:
    """Leases a row and its lane, which are free; returns the row as it is now."""
    lane = tables.parked[key].row.lane
    # A lease that still shows has run out: its holder vanished in the middle of an attempt.
    for other in list(tables.parked_in[lane]) if lane else [key]:
        if tables.parked[other].lease_until:
            row = tables.parked[other].row
            tables.park(Parked(msgspec.structs.replace(row, attempts=row.attempts + 1)))
    if lane:
        known = tables.lanes.get(lane)
        number = known.next_sequence if known is not None else 1
        tables.lanes[lane] = Lane(next_sequence=number, lease_until=until, at=now)
    row = tables.parked[key].row
    tables.park(Parked(row, token, until))
    return row


def renew(tables: Tables, tasks: Sequence[Task], now: int, lease_us: int) -> list[Task]:
    """Extends the leases that still hold; see `TaskStore.renew`."""
    until = now + lease_us
    kept = [task for task in tasks if holds(tables, task)]
    for task in kept:
        row = task.row
        parked = tables.parked[row.consumer, row.message_id]
        tables.park(msgspec.structs.replace(parked, lease_until=until))
        if row.lane in tables.lanes:
            lane = tables.lanes[row.lane]
            tables.lanes[row.lane] = msgspec.structs.replace(lane, lease_until=until, at=now)
    return [msgspec.structs.replace(task, lease_until=until) for task in kept]


def holds(tables: Tables, task: Task) -> bool:
    """True while the task is its holder's: nobody else was given it since."""
    parked = tables.parked.get((task.row.consumer, task.row.message_id))
    return parked is not None and parked.token == task.token


def end(tables: Tables, finish: Finish, now: int) -> None:
    """Writes the end of a task that is still its holder's, all but its outbox rows."""
    key = (finish.task.row.consumer, finish.task.row.message_id)
    row = tables.parked[key].row
    if finish.retry_at is not None:
        again = msgspec.structs.replace(
            row,
            due_at=finish.retry_at,
            attempts=row.attempts + finish.counts,
            error=lenient(finish.error) or row.error,
        )
        tables.park(Parked(again))
    else:
        tables.unpark(key)
        if row.envelope.undoes:
            tables.tombstones.setdefault(row.envelope.undoes, Tombstone(row.consumer, now))
    if row.lane in tables.lanes:
        number = tables.lanes[row.lane].next_sequence
        if finish.retry_at is None and not row.envelope.undoes:
            number = max(number, row.sequence + 1)
        tables.lanes[row.lane] = Lane(next_sequence=number, lease_until=0, at=now)
    if finish.dead_letter is not None:
        tables.bury(fit_letter(finish.dead_letter))


def next_due(tables: Tables, consumers: Collection[str], now: int) -> int | None:
    """When the next row of these consumers will be due; None where none waits for its time."""
    rows = (
        tables.parked[key].row
        for consumer in consumers
        for key in tables.parked_for.get(consumer, ())
    )
    times = (row.due_at for row in rows if row.reason == WORK and row.due_at is not None)
    return min((at for at in times if at > now), default=None)
