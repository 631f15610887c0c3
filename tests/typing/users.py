"""What type checkers say about a user's code: checked by mypy --strict and pyright, and run once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, assert_type

from sagacity import (
    Command,
    CommandDone,
    CommandFailed,
    Event,
    Saga,
    State,
    defer,
    ignore,
    on,
    on_done,
    on_failure,
    on_timeout,
)
from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope
from sagacity.core.instance import PendingCommand


class AccountsNeeded(Event, topic="orders"):
    order_ref: str
    user_ref: str
    systems: list[str]


class CreateAccount(Command, topic="accounts"):
    user_ref: str
    system: str


class ReleaseAccount(Command, topic="accounts", version=2):
    user_ref: str
    system: str


class AccountCreated(Event, topic="accounts"):
    system: str


class EmailConfirmed(Event, topic="users", name="users.Confirmed"):
    user_ref: str
    at: datetime | None = None


class OrderChanged(Event, topic="orders", abstract=True):
    order_ref: str


class OrderPaid(OrderChanged):
    amount: int = 0


class OrderClosed(OrderChanged): ...


class AccountGeneration(Saga, key="order_ref"):
    """Create the accounts an order asks for, once its user's address is confirmed."""

    waiting = State()
    creating = State()
    ready = State(final=True)
    refused = State(final=True)

    order_ref: str
    user_ref: str = ""
    systems: list[str] = []
    created: list[str] = []

    ignore(OrderClosed, when=waiting)
    defer(OrderPaid, when=(waiting,))

    @on(AccountsNeeded, starts=True, goto=waiting)
    def begin(self, event: AccountsNeeded) -> None:
        self.user_ref, self.systems = event.user_ref, event.systems
        self.correlate("user_ref", event.user_ref)
        self.set_timeout("opt-in", after=timedelta(days=14))
        assert_type(event.systems, list[str])
        assert_type(self.now, datetime)
        assert_type(self.key, str)
        assert_type(self.state, str)
        assert_type(self.message, Envelope)
        assert_type(self.new_id("x"), str)

    @on(EmailConfirmed, key="user_ref", when=waiting, goto=creating)
    def create(self, event: EmailConfirmed) -> None:
        for system in self.systems:
            command_id = self.send(
                CreateAccount(self.user_ref, system), undo=ReleaseAccount(self.user_ref, system)
            )
            assert_type(command_id, str)
        assert_type(self.publish(OrderPaid(self.order_ref, amount=3)), str)

    @on(AccountCreated, when=creating, goto=(creating, ready))
    def created_one(self, event: AccountCreated) -> None:
        self.created.append(event.system)
        assert_type(self.pending, tuple[PendingCommand, ...])
        if not self.pending:
            self.goto(self.ready)

    @on(OrderPaid, OrderClosed, when=creating)
    def changed(self, event: OrderPaid | OrderClosed) -> None:
        if isinstance(event, OrderPaid):
            assert_type(event.amount, int)

    @on_done(CreateAccount, when=creating)
    def done(self, reply: CommandDone) -> None: ...

    @on_failure(CreateAccount, when=creating, goto=refused)
    @on_timeout("opt-in", when=waiting, goto=refused)
    def give_up(self) -> None:
        self.compensate("accounts could not be created")


class Stacked(
    Saga, key="order_ref", name="orders.Stacked", version=3, restartable=True, parallel=True
):
    """Decorators on top of each other, asynchronous handlers, wider argument types."""

    first = State()
    last = State(final=True)
    order_ref: str

    @on(OrderPaid, starts=True, goto=first)
    @on(OrderClosed, when=first, goto=last)
    def paid_or_closed(self, event: OrderPaid | OrderClosed) -> None: ...

    @on(OrderPaid, when=first)
    async def any_change(self, event: OrderChanged) -> None: ...

    @on_failure(CreateAccount, ReleaseAccount, when=first)
    async def failed(self, failure: CommandFailed) -> None:
        assert_type(failure.refused, bool)


def facts() -> None:
    """What is seen from outside a handler."""
    event = AccountsNeeded("o1", "ann", systems=["crm"])
    assert_type(event, AccountsNeeded)
    assert_type(EmailConfirmed("ann").at, datetime | None)
    assert_type(AccountGeneration.waiting, State)
    assert_type(AccountGeneration.__definition__, Definition)
    assert_type(AccountGeneration(order_ref="o1").created, list[str])
    kept: Callable[..., None] = AccountGeneration.give_up
    anything: Any = kept
    assert anything is AccountGeneration.give_up
