"""Running all invariants."""

from typing import Final

import msgspec
from sqlalchemy import select

from examples.batch_import.checking.evidence import Evidence, Found, opened
from examples.batch_import.checking.invariant import Invariant
from examples.batch_import.checking.machinery import (
    contexts_are_apart,
    histories_replay,
    messages_have_an_origin,
    messages_leave,
    nothing_counts_twice,
    sagas_go_on,
    undone_in_reverse,
)
from examples.batch_import.checking.promises import (
    confirmed_first,
    nothing_is_left_over,
    one_account,
    one_mail_a_cycle,
    orders_hold_what_they_say,
)
from examples.batch_import.checking.records import only_listed_columns_change, records_are_settled
from sagacity.backends.sql.tables import dead_letter, saga
from sagacity.core.instance import Status, decode_ledger

SHOWN: Final = 20
"""Contradictions kept per invariant."""
INVARIANTS: Final[tuple[Invariant, ...]] = (
    confirmed_first,
    one_mail_a_cycle,
    one_account,
    orders_hold_what_they_say,
    nothing_is_left_over,
    records_are_settled,
    only_listed_columns_change,
    messages_leave,
    sagas_go_on,
    messages_have_an_origin,
    histories_replay,
    contexts_are_apart,
    nothing_counts_twice,
    undone_in_reverse,
)


class Verdict(msgspec.Struct, frozen=True):
    """Whether one invariant holds; `wrong` says what contradicts it, the first ones of `count`."""

    name: str
    claim: str
    count: int
    wrong: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.count


async def check_all(evidence: Evidence) -> list[Verdict]:
    """All invariants, in order; those about a service that does not run are left out."""
    verdicts: list[Verdict] = []
    async with opened(evidence) as found:
        for invariant in INVARIANTS:
            if not invariant.about <= found.connections.keys():
                continue
            wrong = await invariant.contradictions(found)
            verdicts.append(
                Verdict(invariant.name, invariant.claim, len(wrong), tuple(wrong[:SHOWN]))
            )
    return verdicts


async def held_up(evidence: Evidence) -> list[str]:
    """What needs a person: sagas stuck in compensation, dead letters, held messages."""
    lines: list[str] = []
    async with opened(evidence) as found:
        for service in found.connections:
            lines += await _held_up_in(found, service)
    return lines


async def _held_up_in(found: Found, service: str) -> list[str]:
    stuck = select(saga.c.saga_type, saga.c.saga_key, saga.c.ledger).where(
        saga.c.status == Status.STUCK.value
    )
    lines: list[str] = []
    for saga_type, key, ledger in await found.rows(service, stuck):
        compensation = decode_ledger(ledger).compensation
        assert compensation is not None
        why = "; ".join(f"{text:.200}" for text in compensation.errors.values())
        lines.append(f"{service}: {saga_type} {key.decode()} is stuck in compensation: {why}")
    letters = select(dead_letter.c.consumer, dead_letter.c.message_type, dead_letter.c.error).where(
        dead_letter.c.replayed_at.is_(None)
    )
    for consumer, message_type, error in await found.rows(service, letters):
        last = error.decode(errors="replace").strip().rpartition("\n")[2]
        lines.append(
            f"{service}: dead letter {message_type.decode()} for {consumer.decode()}: {last:.200}"
        )
    return lines
