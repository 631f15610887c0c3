"""A plan against the tables: first every guard is asked, then all of it is written.

Nothing can fail between the first change and the last, so a plan is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from sagacity.backends.memory.tables import Key, Parked, Seen, Tables
from sagacity.core.errors import Conflict, DataRefused, KeyTaken
from sagacity.core.plan import DeadLetterRow, Plan

_INT64_MAX = 2**63 - 1


def check_plan(tables: Tables, plan: Plan, locked_by_others: Collection[Key]) -> None:
    """Raises Conflict, KeyTaken or DataRefused where the plan cannot be written; changes nothing."""
    _check_values(plan)
    _check_sagas(tables, plan, locked_by_others)
    _check_inbox(tables, plan)
    _check_correlations(tables, plan)
    _check_parked(tables, plan)


def write_plan(tables: Tables, plan: Plan) -> None:
    """Writes a checked plan, all but its outbox rows, in the order of its lists."""
    for instance in plan.saga_inserts:
        tables.sagas[instance.type, instance.key] = instance
    for instance, _ in plan.saga_updates:
        tables.sagas[instance.type, instance.key] = instance
    for row in plan.inbox:
        tables.inbox[row.consumer, row.message_id] = Seen(row.outcome, plan.now)
    for key in plan.correlations_dropped:
        tables.drop_keys(key)
    for correlation in plan.correlations:
        tables.correlate(correlation)
    for past in plan.correlations_past:
        tables.past_keys[past] = plan.now
    for key in plan.timeouts_cancelled:
        tables.timeouts.pop(key, None)
    for timeout in plan.timeouts:
        tables.timeouts[timeout.uid, timeout.name] = timeout
    for key in set(plan.unparked):
        tables.unpark(key)
    for parked in plan.parked:
        tables.park(Parked(msgspec.structs.replace(parked, error=lenient(parked.error))))
    for key in plan.released:
        _make_due(tables, key, plan.now)
    for saga_type, lane in plan.woken:
        for key in tables.parked_in.get(lane, ()):
            if tables.parked[key].row.saga_type == saga_type:
                _make_due(tables, key, plan.now)
    for letter in plan.dead_letters:
        tables.bury(fit_letter(letter))
    tables.transitions.extend(plan.transitions)


def fit_letter(row: DeadLetterRow) -> DeadLetterRow:
    """A dead letter whose texts can be stored, whatever arrived."""
    return msgspec.structs.replace(
        row,
        topic=lenient(row.topic),
        message_type=lenient(row.message_type),
        error=lenient(row.error),
    )


def lenient(text: str) -> str:
    """`text`, with what UTF-8 cannot encode written as an escape."""
    return text.encode(errors="backslashreplace").decode()


def _make_due(tables: Tables, key: Key, now: int) -> None:
    parked = tables.parked.get(key)
    if parked is not None and (parked.row.due_at is None or parked.row.due_at > now):
        row = msgspec.structs.replace(parked.row, due_at=now)
        tables.park(msgspec.structs.replace(parked, row=row))


# --- guards --------------------------------------------------------------------------------------


def _check_values(plan: Plan) -> None:
    """Refuses what no database takes: text that is not UTF-8, numbers above 64 bits."""
    # The text of an error may hold anything; it is made fit instead of refused.
    checked = msgspec.structs.replace(
        plan,
        dead_letters=[fit_letter(row) for row in plan.dead_letters],
        parked=[msgspec.structs.replace(row, error="") for row in plan.parked],
    )
    try:
        msgspec.msgpack.encode(checked)
    except (UnicodeEncodeError, OverflowError, msgspec.MsgspecError) as error:
        raise DataRefused(
            f"write: expected text that UTF-8 can encode and numbers of 64 bits, got {error}"
        ) from error
    times = [timeout.due_at for timeout in plan.timeouts]
    times += [parked.due_at for parked in plan.parked if parked.due_at is not None]
    for at in times:
        if at > _INT64_MAX:
            raise DataRefused(f"write: expected a time of at most {_INT64_MAX}, got {at}")


def _check_sagas(tables: Tables, plan: Plan, locked_by_others: Collection[Key]) -> None:
    started = [(one.type, one.key) for one in plan.saga_inserts]
    if len(set(started)) < len(started) or not tables.sagas.keys().isdisjoint(started):
        raise Conflict(
            f"write: expected {len(started)} new instances, got one that exists; another worker "
            "started it first; run the batch again"
        )
    for instance, before in plan.saga_updates:
        key = (instance.type, instance.key)
        known = tables.sagas.get(key)
        if known is None or known.version != before or key in locked_by_others:
            got = "none" if known is None else f"version {known.version}"
            raise Conflict(
                f"write: expected {instance.type} {instance.key!r} at version {before}, got {got}; "
                "another worker changed it; run the batch again"
            )


def check_unchanged(
    tables: Tables, read: Mapping[Key, int], locked_by_others: Collection[Key]
) -> None:
    """Raises Conflict where an instance is not what it was when it was read without a lock."""
    for key, version in read.items():
        known = tables.sagas.get(key)
        if known is None or known.version != version or key in locked_by_others:
            raise Conflict(
                f"write: expected {key[0]} {key[1]!r} at version {version}; another worker changed it "
                "or is about to; run the batch again"
            )


def is_armed(tables: Tables, timeout: tuple[str, str, int]) -> bool:
    """True while a timeout (uid, name, generation) is armed."""
    row = tables.timeouts.get(timeout[:2])
    return row is not None and row.generation == timeout[2]


def check_armed(tables: Tables, plan: Plan, armed: Collection[tuple[str, str, int]]) -> None:
    """Raises Conflict where a timeout that was read without a lock, and is cancelled, has gone."""
    cancelled = set(plan.timeouts_cancelled)
    for timeout in armed:
        if timeout[:2] in cancelled and not is_armed(tables, timeout):
            raise Conflict(
                f"write: expected the timeout {timeout[1]!r} of {timeout[0]} to be armed, got none; "
                "another worker took it over; run the batch again"
            )


def _check_inbox(tables: Tables, plan: Plan) -> None:
    rows = [(row.consumer, row.message_id) for row in plan.inbox]
    if len(set(rows)) < len(rows) or not tables.inbox.keys().isdisjoint(rows):
        raise Conflict(
            f"write: expected {len(rows)} unseen messages, got one that was seen; another worker "
            "handled it; run the batch again"
        )


def _check_correlations(tables: Tables, plan: Plan) -> None:
    dropped = set(plan.correlations_dropped)
    owners: dict[tuple[str, str, str], str] = {}
    for row in plan.correlations:
        if not row.unique:
            continue
        place = (row.saga_type, row.name, row.value)
        known = tables.correlations.get(place, {})
        keeping = (key for key, unique in known.items() if unique)
        owner = next((k for k in keeping if (row.saga_type, k) not in dropped), row.saga_key)
        if owner == row.saga_key:
            owner = owners.setdefault(place, row.saga_key)
        if owner != row.saga_key:
            raise KeyTaken(row.saga_type, row.name, row.value, owner)


def _check_parked(tables: Tables, plan: Plan) -> None:
    taken = set(plan.unparked)
    if not taken <= tables.parked.keys():
        raise Conflict(
            f"write: expected {len(taken)} parked messages, got fewer; another worker took one "
            "over; run the batch again"
        )
    rows = [(row.consumer, row.message_id) for row in plan.parked]
    if len(set(rows)) < len(rows) or any(row in tables.parked and row not in taken for row in rows):
        raise Conflict(
            f"write: expected {len(rows)} messages that are not parked yet, got one that is; another "
            "worker parked it; run the batch again"
        )
