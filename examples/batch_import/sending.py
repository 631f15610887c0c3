"""Commands from outside: from a command line or a web page, by the outbox of one service's database.

A command that is in the outbox is accepted. It is sent to the bus at once where that can be reached;
otherwise the service's own relay sends it when it can.
"""

import time
from collections.abc import Sequence
from uuid import uuid4

from sagacity import Command
from sagacity.backends.sql import SqlStore
from sagacity.core.delivery import Envelope, enveloped
from sagacity.core.errors import BusError
from sagacity.core.plan import OutboxRow
from sagacity.ports import Bus
from sagacity.worker.opening import open_bus


def envelope_of(command: Command, *, source: str, actor: str = "") -> Envelope:
    """The message of a command that nothing caused: what follows has its id as correlation id."""
    message_id = uuid4().hex
    return enveloped(
        command,
        message_id=message_id,
        time=time.time_ns() // 1000,
        source=source,
        correlation_id=message_id,
        actor=actor,
    )


async def send(
    command: Command, *, store: str, bus: str = "", prefix: str = "", source: str, actor: str = ""
) -> str:
    """Accept a command durably in the database `store`; returns its id.

    With a `bus` it leaves at once.
    """
    opened = SqlStore(store)
    try:
        return await send_by(opened, [command], bus=bus, prefix=prefix, source=source, actor=actor)
    finally:
        await opened.close()


async def send_by(
    store: SqlStore,
    commands: Sequence[Command],
    *,
    bus: str = "",
    prefix: str = "",
    source: str,
    actor: str = "",
) -> str:
    """The same with an open store, for several commands; returns the id of the last one."""
    envelopes = [envelope_of(command, source=source, actor=actor) for command in commands]
    pending = await store.append([OutboxRow("", envelope) for envelope in envelopes])
    if bus:
        opened: Bus = open_bus(bus, prefix=prefix)
        try:
            await opened.publish([row.envelope for row in pending])
            await store.published([row.seq for row in pending])
        except BusError:
            pass  # the relay sends it
        finally:
            await opened.close()
    return envelopes[-1].id
