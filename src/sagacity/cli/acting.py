"""What an operator has an instance do: cancel, try failed undo commands again, or waive them.

An order is a message like any other: it is parked for the instance in the store, a worker takes it
under the instance's lock, and the history keeps it with its reason and who gave it. So it needs no
bus, cannot collide with a worker, and reaches an instance that is blocked by a failed message.
"""

from __future__ import annotations

import getpass
from uuid import uuid4

from sagacity.core.decide import Cancel, RetryUndo, WaiveUndo
from sagacity.core.delivery import enveloped
from sagacity.core.errors import ConfigurationError
from sagacity.core.instance import Instance, Status
from sagacity.core.plan import ParkedRow, Plan
from sagacity.ports import Store

__all__ = ["Order", "operator_name", "order", "preview"]

Order = Cancel | RetryUndo | WaiveUndo


def preview(instance: Instance, message: Order) -> list[str]:
    """What the order will do, one line per undo command, in order.

    Raises ConfigurationError where it does not apply to the instance as it is now.
    """
    ledger = instance.ledger
    if isinstance(message, Cancel):
        if instance.status is not Status.RUNNING:
            raise _refused(instance, "a running instance")
        return [
            f"{entry.undo_type} undoes {entry.type}"
            + ("" if entry.confirmed else ", which may not have happened")
            for entry in reversed(ledger.undo)
        ]
    compensation = ledger.compensation
    if compensation is None or not compensation.failed:
        raise _refused(instance, "an instance with undo commands that failed")
    verb = "is sent again" if isinstance(message, RetryUndo) else "is taken as settled"
    return [
        f"{entry.undo_type} of {entry.type} {verb}"
        for entry in reversed(list(compensation.failed.values()))
    ]


async def order(store: Store, instance: Instance, message: Order, *, actor: str) -> str:
    """Gives the order to whichever worker runs the saga; returns its message id.

    It is for this instance only: one that takes the key later does not hear it.
    """
    envelope = enveloped(
        message,
        message_id=f"operator:{uuid4().hex}",
        time=store.clock.now(),
        source="saga",
        correlation_id=instance.ledger.correlation_id,
        actor=actor,
        saga_type=instance.type,
        saga_key=instance.key,
        saga_uid=instance.uid,
    )
    async with store.transaction() as transaction:
        now = transaction.now
        row = ParkedRow(
            consumer=instance.type,
            message_id=envelope.id,
            saga_type=instance.type,
            saga_key=instance.key,
            due_at=now,
            attempts=0,
            parked_at=now,
            reason="retry",
            envelope=envelope,
        )
        await transaction.write(Plan(now=now, parked=[row]))
    return envelope.id


def operator_name() -> str:
    """Who is at the keyboard, as far as the operating system tells."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "operator"


def _refused(instance: Instance, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"{instance.type} {instance.key!r}: expected {expected}, "
        f"got one that is {instance.status} in {instance.state}"
    )
