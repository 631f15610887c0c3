"""What an operator reads of one instance, from plain values."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from sagacity.cli.story import story
from sagacity.cli.telling import told
from sagacity.core.delivery import Envelope, encode_entry
from sagacity.core.instance import (
    Armed,
    Compensation,
    Instance,
    Ledger,
    PendingCommand,
    Status,
    Undoable,
)
from sagacity.core.plan import DeadLetterRow, TransitionRow
from sagacity.ports import DeadLetter
from tests.cli.services import Order

NOW = 1_800_000_000_000_000
MINUTE = 60_000_000
HOSTILE = "\x1b[2Jfake\r\n\u202e"


def instance(
    status: Status = Status.RUNNING,
    state: str = "charging",
    data: bytes = b'{"ref":"o1","amount":5}',
    **ledger: Any,
) -> Instance:
    return Instance(
        type="Order",
        key="o1",
        uid="u-1",
        version=3,
        status=status,
        state=state,
        schema_version=1,
        data=data,
        ledger=Ledger(steps=3, **ledger),
        started_at=NOW - 90 * MINUTE,
        updated_at=NOW - 20 * MINUTE,
    )


def step(at: int, before: str, after: str, effects: object, **changes: Any) -> TransitionRow:
    row = TransitionRow(
        uid="u-1",
        version=1,
        saga_type="Order",
        saga_key="o1",
        at=at,
        message_id="m1",
        message_type="orders.Ordered",
        handler="begin",
        state_from=before,
        state_to=after,
        status="running",
        correlation_id="c1",
        effects=msgspec.json.encode(effects),
        entry=b"",
    )
    return msgspec.structs.replace(row, **changes)


def letter(error: str = "Traceback ...\nValueError: no such account") -> DeadLetter:
    envelope = Envelope(id="m9", type="payments.Charged", topic="payments")
    row = DeadLetterRow(
        consumer="Order",
        message_id="m9",
        topic="payments",
        message_type="payments.Charged",
        reason="failed",
        error=error,
        attempts=8,
        entry=encode_entry(envelope),
        decoded=True,
        saga_type="Order",
        saga_key="o1",
        at=NOW - 5 * MINUTE,
    )
    return DeadLetter(id=12, row=row, replayed_at=None)


def text(found: Instance | None, *rows: Any, last: int = 0, definition: Any = None) -> str:
    history = [row for row in rows if isinstance(row, TransitionRow)]
    letters = [row for row in rows if isinstance(row, DeadLetter)]
    lines = told(story(found, history, letters, NOW, definition), last=last)
    return click.unstyle("\n".join(lines))


def test_a_running_instance_tells_what_it_waits_for() -> None:
    pending = {
        "c2": PendingCommand("c2", "payments.Charge", "payments", NOW - MINUTE // 2),
        "c1": PendingCommand("c1", "stock.Reserve", "stock", NOW - 20 * MINUTE),
    }
    timeouts = {"late": Armed(1, NOW + 60 * MINUTE), "soon": Armed(2, NOW + MINUTE)}
    told_text = text(
        instance(pending=pending, timeouts=timeouts, keys={"user": ("u7",)}),
        definition=Order.__definition__,
    )
    lines = told_text.splitlines()
    assert lines[0] == "Order o1  RUNNING in charging"
    assert (
        "Waits for 2 answers, longest for stock.Reserve, sent 20 min ago; timeout soon is due in 1 min."
        in lines
    )
    assert "  answer   stock.Reserve  sent 20 min ago  (id c1)" in lines
    assert "  timeout  soon  in 1 min  (2027-01-15 08:01:00.000Z)" in lines
    assert "  event    payments.Charged" in lines
    assert '  ref     "o1"' in lines
    assert "  amount  5" in lines
    assert "  user = u7" in lines


def test_a_blocked_instance_says_so_first() -> None:
    parked = (("Order", "m1"), ("Order", "m2"), ("Order", "m3"))
    deferred = (Envelope(id="e1", type="payments.Charged", topic="payments"),)
    lines = text(instance(parked=parked, deferred=deferred)).splitlines()
    verdict = "BLOCKED by a message that failed and is tried again, 2 more wait behind it."
    assert verdict in lines
    assert "  parked   message m1  failed, is tried again" in lines
    assert "  parked   message m3  waits behind it" in lines
    assert "  early    payments.Charged  is kept until a state handles it  (id e1)" in lines


def test_a_stuck_instance_tells_which_undo_failed_and_why() -> None:
    undo = Undoable("c1", "stock.Reserve", "stock", "stock.Release", 1, b"{}", confirmed=True)
    compensation = Compensation(
        reason="payment refused",
        remaining=(undo, msgspec.structs.replace(undo, type="a.First", undo_type="a.Undo")),
        failed={"x": undo},
        errors={"x": "the warehouse does not answer"},
        attempt=2,
        waived={"c0": "settled by phone"},
    )
    lines = text(instance(Status.STUCK, compensation=compensation)).splitlines()
    assert lines[0] == "Order o1  STUCK in charging"
    assert any(line.startswith("STUCK for 20 min: stock.Release failed for good") for line in lines)
    assert "  because  payment refused  (tried again 2 times)" in lines
    assert "  FAILED   stock.Release of stock.Reserve: the warehouse does not answer" in lines
    nexts = [line for line in lines if line.startswith("  next")]
    assert nexts == ["  next     a.Undo of a.First", "  next     stock.Release of stock.Reserve"]
    assert "  waived   c0: settled by phone" in lines


def test_a_finished_and_an_idle_instance_need_no_help() -> None:
    assert "Finished in paid, 20 min ago." in text(instance(Status.COMPLETED, "paid"))
    assert "Idle for 20 min; only an event can move it." in text(instance())


def test_the_history_reads_as_a_story() -> None:
    rows = [
        step(
            NOW - 90 * MINUTE,
            "",
            "charging",
            {
                "sent": [["payments.Charge", "c1", "command"], ["orders.Seen", "e1", "event"]],
                "timeouts": {"late": NOW},
                "keys": [["user", "u7"]],
            },
        ),
        step(NOW - 20 * MINUTE, "charging", "charging", {"cancelled": ["late"]}, handler=""),
        step(
            NOW - 20 * MINUTE,
            "charging",
            "paid",
            {"reason": "why not"},
            status="completed",
            message_type="payments.Charged",
        ),
    ]
    lines = text(instance(), *rows).splitlines()
    start = lines.index("History, oldest first")
    assert [line.strip() for line in lines[start + 1 :]] == [
        "2027-01-15 06:30:00.000Z  orders.Ordered  by begin  begins in charging",
        "sends payments.Charge  (id c1)",
        "publishes orders.Seen  (id e1)",
        "sets timeout late, due 1 h 30 min later",
        "is found by user = u7",
        "1 h 10 min later",
        "2027-01-15 07:40:00.000Z  orders.Ordered  stays in charging",
        "cancels timeout late",
        "2027-01-15 07:40:00.000Z  payments.Charged  by begin  charging -> paid  [completed]",
        "because why not",
    ]


def test_a_long_history_is_cut_to_its_end() -> None:
    rows = [step(NOW - (9 - i) * 1000, "a", f"s{i}", {}) for i in range(9)]
    lines = text(instance(), *rows, last=2).splitlines()
    assert "  ... 7 earlier steps; --all shows them" in lines
    assert sum("-> s" in line for line in lines) == 2


def test_dead_letters_are_told_with_their_last_line() -> None:
    lines = text(instance(), letter()).splitlines()
    assert "1 of its messages is a dead letter." in [line[:1].upper() + line[1:] for line in lines]
    assert (
        "  #12  5 min ago  payments.Charged  failed after 8 attempts: ValueError: no such account"
        in lines
    )


def test_an_instance_that_is_gone_still_has_its_history() -> None:
    told_text = text(None, step(NOW, "", "charging", {}))
    assert "There is no such instance now; this is what was kept." in told_text
    assert "begins in charging" in told_text


def test_nothing_hostile_reaches_the_terminal() -> None:
    found = msgspec.structs.replace(
        instance(
            Status.STUCK,
            HOSTILE,
            msgspec.json.encode({HOSTILE: HOSTILE}),
            pending={HOSTILE: PendingCommand(HOSTILE, HOSTILE, HOSTILE, NOW)},
            timeouts={HOSTILE: Armed(1, NOW)},
            deferred=(Envelope(id=HOSTILE, type=HOSTILE, topic=HOSTILE),),
            parked=((HOSTILE, HOSTILE),),
            keys={HOSTILE: (HOSTILE,)},
            correlation_id=HOSTILE,
            actor=HOSTILE,
            compensation=Compensation(
                reason=HOSTILE,
                failed={"x": Undoable("c", HOSTILE, "t", HOSTILE, 1, b"")},
                errors={"x": HOSTILE},
                waived={HOSTILE: HOSTILE},
            ),
        ),
        type=HOSTILE,
        key=HOSTILE,
        uid=HOSTILE,
    )
    effects = {
        "sent": [[HOSTILE, HOSTILE, "command"]],
        "timeouts": {HOSTILE: NOW},
        "cancelled": [HOSTILE],
        "keys": [[HOSTILE, HOSTILE]],
        "reason": HOSTILE,
    }
    row = step(NOW, HOSTILE, HOSTILE, effects, handler=HOSTILE, message_type=HOSTILE)
    sent = Envelope(id=HOSTILE, type=HOSTILE, topic=HOSTILE, actor=HOSTILE)
    row = msgspec.structs.replace(row, entry=encode_entry(sent))
    for line in text(found, row, letter(HOSTILE)).splitlines():
        assert line.isprintable()


def test_rows_that_cannot_be_read_do_not_hide_the_rest() -> None:
    broken = msgspec.structs.replace(step(NOW, "", "charging", {}), effects=b"\xff")
    told_text = text(instance(data=b"\xff\x00"), broken)
    assert "(cannot be read: ff00)" in told_text
    assert "the effects of this step cannot be read" in told_text
