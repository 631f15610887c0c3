"""What an invariant is: a name, a claim, and a function that looks for the contrary."""

from collections.abc import Awaitable, Callable, Collection

import msgspec

from examples.batch_import.checking.evidence import Found

Contradictions = Callable[[Found], Awaitable[list[str]]]
"""Returns one line for each thing that contradicts the claim; an empty list is good."""


class Invariant(msgspec.Struct, frozen=True):
    """Something that must hold whenever nothing is under way."""

    name: str
    claim: str
    about: frozenset[str]
    """The services that must be there to tell."""
    contradictions: Contradictions


def invariant(
    name: str, claim: str, *, about: Collection[str] = ()
) -> Callable[[Contradictions], Invariant]:
    """Makes an invariant of a function."""
    return lambda function: Invariant(name, claim, frozenset(about), function)
