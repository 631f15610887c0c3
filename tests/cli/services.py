"""Small services that the tests of the commands run."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from sagacity import Command, Event, Refused, Saga, Service, State, handles, on


class Ordered(Event, topic="orders"):
    ref: str


class Charged(Event, topic="payments"):
    ref: str


class Charge(Command, topic="payments"):
    ref: str


class Refund(Command, topic="payments"):
    ref: str


class Block(Command, topic="payments"):
    ref: str


class Order(Saga, key="ref"):
    """An order is charged."""

    charging = State()
    paid = State(final=True)

    ref: str

    @on(Ordered, starts=True, goto=charging)
    def begin(self, event: Ordered) -> None:
        self.send(Charge(event.ref), undo=Refund(event.ref))

    @on(Charged, when=charging, goto=paid)
    def finish(self, event: Charged) -> None:
        pass


def notes() -> Path:
    """Where handlers leave notes for the test that started this process."""
    return Path(os.environ["TEST_NOTES"])


@handles(Charge)
async def charge(command: Charge) -> Charged:
    """Begins, waits until the test lets it end, and ends."""
    with (notes() / f"begun-{command.ref}").open("a") as begun:
        begun.write(f"{os.getpid()}\n")
    while not (notes() / f"release-{command.ref}").exists():  # noqa: ASYNC110 - another process says
        await asyncio.sleep(0.01)
    (notes() / f"ended-{command.ref}").touch()
    return Charged(command.ref)


@handles(Refund)
async def refund(command: Refund) -> None:
    """Refuses until the test allows it."""
    if not (notes() / f"refund-{command.ref}").exists():
        raise Refused("the bank is closed")


@handles(Block)
async def block(command: Block) -> None:
    """Keeps the event loop busy for good, as badly written code does."""
    (notes() / f"begun-{command.ref}").touch()
    while True:
        time.sleep(60)  # noqa: ASYNC251 - the very fault to survive


service = Service("shop", sagas=[Order], handlers=[charge, refund, block])
not_a_service = "shop"


def make_service() -> Service:
    return Service("made", sagas=[Order], handlers=[charge, refund])
