"""The statements of one real commit of 300 messages, for docs/explanation/group-commit.md."""

from __future__ import annotations

import re
import textwrap

from sagacity import Command, Event, Saga, Service, State, handles, on
from sagacity.backends.memory import MemoryBus
from sagacity.backends.sql import SqlStore
from sagacity.core.delivery import Delivery, Envelope
from sagacity.core.messages import encode_message, message_type
from sagacity.testing.clock import VirtualClock
from sagacity.worker.cycle import Cycle
from tests.backends.sql.statement_log import Statement, logged
from tests.docs.pages import CHECKOUT

PAGE = CHECKOUT / "docs/explanation/group-commit.md"
BEGIN, END = "<!-- statements -->\n", "<!-- end of statements -->\n"
SIZE = 300


class OrderPlaced(Event, topic="orders"):
    ref: str


class TakeMoney(Command, topic="payments"):
    ref: str


class MoneyTaken(Event, topic="payments"):
    ref: str


class Ship(Command, topic="parcels"):
    ref: str


class Shipped(Event, topic="parcels"):
    ref: str


class Order(Saga, key="ref"):
    paying = State()
    shipping = State()
    done = State(final=True)

    ref: str

    @on(OrderPlaced, starts=True, goto=paying)
    def pay(self, event: OrderPlaced) -> None:
        self.send(TakeMoney(event.ref))

    @on(MoneyTaken, when=paying, goto=shipping)
    def ship(self, event: MoneyTaken) -> None:
        self.send(Ship(event.ref))

    @on(Shipped, when=shipping, goto=done)
    def finish(self, event: Shipped) -> None: ...


@handles(TakeMoney)
async def take_money(command: TakeMoney) -> MoneyTaken:
    return MoneyTaken(command.ref)


def delivery(event: Event, number: int) -> Delivery:
    facts = message_type(event)
    envelope = Envelope(
        id=f"{facts.name}-{number}", type=facts.name, topic=facts.topic, body=encode_message(event)
    )
    return Delivery(topic=facts.topic, entry_id=str(number), envelope=envelope)


async def statements(url: str, size: int = SIZE) -> list[Statement]:
    """What the database is sent for one batch: half of it starts sagas, half of it moves others on."""
    store = SqlStore(url, clock=VirtualClock())
    try:
        await store.prepare(create=True)
        service = Service("shop", sagas=[Order], handlers=[take_money])
        cycle = Cycle(service, service.catalog(), store, MemoryBus())
        half = size // 2
        placed = [delivery(OrderPlaced(f"o{n}"), n) for n in range(size)]
        taken = [delivery(MoneyTaken(f"o{n}"), n) for n in range(half)]
        before = await cycle.settle(placed[:half])
        await cycle.publish(before.pending)
        with logged(store) as sent:
            settled = await cycle.settle([*placed[half:], *taken])
        assert sum(settled.outcomes.values()) == size
        return sent
    finally:
        await store.close()


def text_of(sent: list[Statement]) -> str:
    """The statements as they stand in the page: only line breaks and indentation are ours."""
    parts: list[str] = []
    for number, one in enumerate(sent, 1):
        rows = max(
            (len(value) for value in one.parameters or () if isinstance(value, (list, tuple))),
            default=0,
        )
        note = f"-- {number}" + (f": arrays of {rows}" if rows else "")
        flat = re.sub(r"\s+", " ", one.sql).strip()
        flat = re.sub(r" (?=(?:FROM|WHERE|ORDER BY|ON CONFLICT|RETURNING|SELECT|FOR) )", "\n", flat)
        lines = [
            "\n".join(textwrap.wrap(line, 110, subsequent_indent="    ", break_on_hyphens=False))
            for line in flat.splitlines()
        ]
        parts.append(note + "\n" + "\n".join(lines) + ";")
    return "\n\n".join(parts)


def page_with(source: str, sent: list[Statement]) -> str:
    """The page with these statements in their place."""
    head, _, rest = source.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n```sql\n{text_of(sent)}\n```\n\n{END}{tail}"
