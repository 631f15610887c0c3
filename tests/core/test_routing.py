"""Which sagas a message concerns."""

from __future__ import annotations

import pytest

from sagacity import Command, Event, Saga, Service, State, handles, on
from sagacity.core.routing import route
from sagacity.testing import Inline


class Ordered(Event, topic="orders"):
    ref: str


class Ship(Command, topic="parcels"):
    ref: str


class TakeBack(Command, topic="parcels"):
    ref: str


class Shipped(Event, topic="parcels"):
    ref: str


class Order(Saga, key="ref"):
    shipping = State()
    done = State(final=True)

    ref: str

    @on(Ordered, starts=True, goto=shipping)
    def begin(self, event: Ordered) -> None:
        self.send(Ship(event.ref), undo=TakeBack(event.ref))

    @on(Shipped, when=shipping, goto=done)
    def finish(self, event: Shipped) -> None: ...


@handles(Ship)
async def ship(command: Ship) -> Shipped:
    return Shipped(command.ref)


@handles(TakeBack)
async def take_back(command: TakeBack) -> None: ...


@pytest.mark.asyncio
async def test_a_service_that_hears_its_own_commands_leaves_them_to_whom_they_are_for() -> None:
    """The topic of a reply may be the one of the command; the sender then hears both."""
    ordering, parcels = (
        Service("ordering", sagas=[Order]),
        Service("parcels", handlers=[ship, take_back]),
    )
    async with Inline(ordering, parcels) as app:
        await app.publish(Ordered("o1"))
        await app.run()
        assert (await app.saga(Order, "o1")).status == "completed"
        assert await app.dead_letters() == []
        commands = [e for e in app.published if e.sequence or e.undoes]
        assert [e.type for e in commands] == ["parcels.Ship"]
        assert route(ordering.catalog(), commands[0]) == []
