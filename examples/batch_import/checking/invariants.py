"""Each invariant as one small function that returns what contradicts it."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from sqlalchemy import func, select

from examples.batch_import.checking.evidence import Found

Contradictions = Callable[[Found], Awaitable[list[str]]]


class Invariant(msgspec.Struct, frozen=True):
    """What must hold, and the function that looks for the contrary."""

    name: str
    claim: str
    contradictions: Contradictions


INVARIANTS: list[Invariant] = []
F = TypeVar("F", bound=Contradictions)


def invariant(name: str, claim: str) -> Callable[[F], F]:
    """Adds a function to the list that `check` goes through."""

    def add(function: F) -> F:
        INVARIANTS.append(Invariant(name, claim, function))
        return function

    return add


@invariant("I6", "every staged record is applied, stale or quarantined, as the report says")
async def records_are_settled(found: Found) -> list[str]:
    wrong: list[str] = []
    batches = {
        row.id: row
        for row in await found.rows("importing", select(found.table("importing", "batch")))
    }
    record = found.table("importing", "record")
    counted = await found.rows(
        "importing",
        select(record.c.batch_id, record.c.state, func.count()).group_by(
            record.c.batch_id, record.c.state
        ),
    )
    counts: dict[str, dict[str, int]] = {batch_id: {} for batch_id in batches}
    for batch_id, state, count in counted:
        counts.setdefault(batch_id, {})[state] = count
    for batch_id, states in counts.items():
        batch = batches.get(batch_id)
        if batch is None:
            wrong.append(f"records of batch {batch_id}, which does not exist")
        elif batch.state == "rejected" and states:
            wrong.append(f"batch {batch_id} is rejected and left {states}")
        elif batch.state == "imported":
            told = {
                "applied": batch.applied,
                "stale": batch.stale,
                "quarantined": batch.quarantined,
            }
            told = {state: count for state, count in told.items() if count}
            if states != told or sum(states.values()) != batch.records:
                wrong.append(
                    f"batch {batch_id} says {told} of {batch.records}; its records say {states}"
                )
    return wrong
