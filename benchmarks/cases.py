"""What is measured: workloads, concurrencies, and how long."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One load on one system."""

    workload: str
    concurrency: int
    options: tuple[str, ...] = ()
    """Further arguments of `benchmarks.load`."""
    pace: float = 1.0
    """How many sagas a second to expect, against the happy path."""
    rate: float = 0.0
    """Sagas a second of an open loop."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    form: str
    repeats: int
    seconds: float
    """How long one repeat shall take, about."""
    concurrencies: tuple[int, ...]
    workers: tuple[int, ...]
    variants: tuple[str, ...]
    compared: int
    """Concurrency at which the variants are compared with the happy path."""
    half_load: bool
    batches: tuple[int, ...]
    curve_repeats: int
    peers: bool


FULL_FORM = Extent(
    form="full",
    repeats=5,
    seconds=0.7,
    concurrencies=(10, 100, 1000, 2000),
    workers=(1, 2),
    variants=("compensate", "hot", "duplicates", "payload-2k", "payload-20k"),
    compared=1000,
    half_load=True,
    batches=(1, 4, 16, 64, 256, 512),
    curve_repeats=3,
    peers=True,
)
QUICK_FORM = Extent(
    form="quick",
    repeats=3,
    seconds=0.4,
    concurrencies=(400,),
    workers=(1,),
    variants=("compensate", "hot", "duplicates"),
    compared=400,
    half_load=False,
    batches=(),
    curve_repeats=0,
    peers=False,
)

IDLE = Case("idle", 1)
VARIANTS = {
    case.workload: case
    for case in (
        Case("compensate", 0, ("--workload", "compensate"), pace=0.5),
        Case("hot", 0, ("--workload", "hot"), pace=2.0),
        Case("duplicates", 0, ("--duplicates", "0.1")),
        Case("payload-2k", 0, ("--payload", "2048"), pace=0.7),
        Case("payload-20k", 0, ("--payload", "20480"), pace=0.2),
    )
}
"""Further workloads, for any concurrency."""


def happy(concurrency: int) -> Case:
    """The happy path."""
    return Case("happy", concurrency)


def batch(size: int) -> Case:
    """The happy path with at most `size` messages a transaction, and work for several of them."""
    return Case(f"batch-{size}", min(2000, max(10, 4 * size)))


def half_load(capacity: float) -> Case:
    """An open loop at half of `capacity` sagas a second."""
    return replace(Case("half-load", 0), rate=round(capacity / 2, 1))


def sagas(case: Case, pace: float, seconds: float) -> int:
    """How many sagas fill `seconds` at `pace` sagas a second, and the loop more than twice.

    What is slow fills it only once, rather than take minutes.
    """
    if case.rate:
        return max(10, int(case.rate * seconds * 2))
    filled = min(int(2.5 * case.concurrency), max(case.concurrency, int(pace * seconds * 3)))
    return max(20, filled, int(pace * seconds))
