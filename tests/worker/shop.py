"""A small domain for tests of the worker: orders, payments, subscribers that can be told to fail."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

from sagacity import (
    Command,
    Context,
    Event,
    Refused,
    Saga,
    Service,
    State,
    handles,
    on,
    on_failure,
    on_timeout,
    subscribes,
)


class OrderPlaced(Event, topic="orders"):
    order_ref: str
    amount: int = 0


class OrderNoted(Event, topic="orders"):
    order_ref: str


class Charge(Command, topic="payments"):
    order_ref: str
    amount: int


class Refund(Command, topic="payments"):
    order_ref: str
    amount: int


class Charged(Event, topic="payments"):
    order_ref: str


class Ship(Command, topic="payments"):
    order_ref: str


class Shipped(Event, topic="payments"):
    order_ref: str


class Poke(Event, topic="orders"):
    order_ref: str
    boom: bool = False


class Order(Saga, key="order_ref"):
    charging = State()
    shipping = State()
    done = State(final=True)
    failed = State(final=True)

    order_ref: str
    seen: list[str] = []

    @on(OrderPlaced, starts=True, goto=charging)
    def place(self, event: OrderPlaced) -> None:
        self.send(Charge(event.order_ref, event.amount), undo=Refund(event.order_ref, event.amount))
        self.set_timeout("patience", after=timedelta(hours=1))

    @on(Charged, when=charging, goto=shipping)
    def charged(self, event: Charged) -> None:
        self.send(Ship(self.order_ref))

    @on(Shipped, when=shipping, goto=done)
    def shipped(self, event: Shipped) -> None: ...

    @on(Poke)
    def poke(self, event: Poke) -> None:
        if event.boom:
            raise ValueError(f"poked {self.order_ref} too hard")
        self.seen.append(self.message.id)

    @on_failure(Charge, Ship, when=(charging, shipping), goto=failed)
    @on_timeout("patience", when=(charging, shipping), goto=failed)
    def give_up(self) -> None:
        self.compensate("cannot be shipped")


Behaviour = Callable[[str], Awaitable[None]]


class Shop:
    """The participants, with what they did, and what they are told to do instead."""

    def __init__(self) -> None:
        self.did: list[tuple[str, str]] = []
        self.attempts: list[tuple[str, str, int, float]] = []
        self.before: dict[str, Behaviour] = {}

    async def _do(self, what: str, ref: str, context: Context) -> None:
        self.attempts.append((what, ref, context.attempt, context.now.timestamp()))
        if what in self.before:
            await self.before[what](ref)
        self.did.append((what, ref))

    @handles(Charge)
    async def charge(self, command: Charge, context: Context) -> Charged:
        await self._do("charge", command.order_ref, context)
        return Charged(command.order_ref)

    @handles(Refund)
    async def refund(self, command: Refund, context: Context) -> None:
        await self._do("refund", command.order_ref, context)

    @handles(Ship)
    async def ship(self, command: Ship, context: Context) -> Shipped:
        await self._do("ship", command.order_ref, context)
        return Shipped(command.order_ref)

    @subscribes(OrderPlaced)
    async def note(self, event: OrderPlaced, context: Context) -> None:
        await self._do("note", event.order_ref, context)

    @subscribes(OrderPlaced)
    async def count(self, event: OrderPlaced, context: Context) -> None:
        await self._do("count", event.order_ref, context)

    def refuse(self, what: str, *refs: str) -> None:
        """From now on `what` is refused for these orders."""

        async def behaviour(ref: str) -> None:
            if ref in refs:
                raise Refused(f"{what} is not possible for {ref}")

        self.before[what] = behaviour

    def fail(self, what: str, times: int, *refs: str) -> None:
        """The next `times` tries of `what` fail, for these orders or for all."""
        left = [times]

        async def behaviour(ref: str) -> None:
            if left[0] > 0 and (not refs or ref in refs):
                left[0] -= 1
                raise ConnectionError(f"{what} cannot be reached")

        self.before[what] = behaviour

    def service(
        self, name: str = "shop", *, sagas: bool = True, subscribers: bool = True
    ) -> Service:
        handlers: list[Callable[..., object]] = [self.charge, self.refund, self.ship]
        if subscribers:
            handlers += [self.note, self.count]
        return Service(name, sagas=[Order] if sagas else [], handlers=handlers)

    def times(self, what: str, ref: str) -> int:
        return self.did.count((what, ref))
