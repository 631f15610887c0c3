"""What is kept of a saga instance between two messages."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sagacity.core.delivery import Envelope
from sagacity.core.instance import (
    Armed,
    Compensation,
    Ledger,
    PendingCommand,
    Status,
    Undoable,
    decode_ledger,
    encode_ledger,
)

UNDOABLE = Undoable("c1", "Book", "bookings", "Release", 1, b"{}", confirmed=True)
FULL = Ledger(
    pending={"c2": PendingCommand("c2", "Book", "bookings", 5, undoes="c1")},
    undo=(UNDOABLE,),
    deferred=(Envelope(id="m", type="t", topic="x", body=b"[1]"),),
    timeouts={"end": Armed(3, 7)},
    generation=3,
    keys={"user": ("ann", "bob")},
    parked=(("Trip", "m2"),),
    sequence={"bookings": 4},
    compensation=Compensation(
        "why",
        remaining=(UNDOABLE,),
        under_way={"u1": UNDOABLE},
        failed={"u2": UNDOABLE},
        errors={"u2": "on strike"},
        attempt=2,
        waived={"c9": "by hand"},
    ),
    correlation_id="c",
    actor="ann",
    hops=1,
    steps=9,
)


@pytest.mark.parametrize("ledger", [Ledger(), FULL])
def test_the_ledger_survives_the_store(ledger: Ledger) -> None:
    assert decode_ledger(encode_ledger(ledger)) == ledger


def test_the_test_above_leaves_no_field_out() -> None:
    assert FULL.compensation is not None
    values: tuple[msgspec.Struct, ...] = (FULL, FULL.compensation)
    for value in values:
        for field in msgspec.structs.fields(type(value)):
            assert getattr(value, field.name) != field.default, field.name


def test_an_empty_ledger_takes_one_byte() -> None:
    assert encode_ledger(Ledger()) == b"\x80"


def test_newer_fields_are_left_out() -> None:
    newer = msgspec.msgpack.encode({"actor": "ann", "a_field_of_tomorrow": [1]})
    assert decode_ledger(newer) == Ledger(actor="ann")


def test_defaults_are_not_shared() -> None:
    one, other = Ledger(), Ledger()
    one.pending["x"] = PendingCommand("x", "Book", "bookings", 0)
    assert other.pending == {}


def test_the_ledger_cannot_be_changed() -> None:
    frozen: Any = FULL
    with pytest.raises(AttributeError):
        frozen.hops = 2


def test_two_statuses_are_the_end() -> None:
    assert [status for status in Status if status.finished] == [
        Status.COMPLETED,
        Status.COMPENSATED,
    ]
