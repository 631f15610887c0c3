"""Running all invariants."""

import msgspec

from examples.batch_import.checking.evidence import Evidence, opened
from examples.batch_import.checking.invariants import INVARIANTS

SHOWN = 20
"""Contradictions kept per invariant."""


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
    """All invariants, in order."""
    verdicts: list[Verdict] = []
    async with opened(evidence) as found:
        for invariant in INVARIANTS:
            wrong = await invariant.contradictions(found)
            verdicts.append(
                Verdict(invariant.name, invariant.claim, len(wrong), tuple(wrong[:SHOWN]))
            )
    return verdicts
