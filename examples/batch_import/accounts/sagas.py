"""One order's way to its accounts in the remote systems, or back to none."""

from datetime import timedelta
from typing import Final

from examples.batch_import.messages import (
    AccountsNeeded,
    BlockOrder,
    CreateBillingAccount,
    CreateLoyaltyAccount,
    CreateShippingAccount,
    EmailConfirmed,
    MarkOrderReady,
    OptInExpired,
    OptInMailRefused,
    OptInPending,
    OrderCancelled,
    ReleaseBillingAccount,
    ReleaseLoyaltyAccount,
    ReleaseShippingAccount,
    RemoteAccountCreated,
    RequestOptIn,
    RequireAccounts,
)
from sagacity import CommandFailed, Saga, State, on, on_done, on_failure, on_timeout

ASK_AGAIN: Final = timedelta(days=15)
"""Longer than any opt-in cycle: whoever still waits then asks how things stand."""
CANCELLABLE: Final = timedelta(days=30)
"""For how long an order that has its accounts can give them back."""


class AccountSaga(Saga, key="order_ref"):
    """Create the accounts an order names once its user's address is confirmed; all, or none.

    The order of the two facts does not matter: authentication answers at once where the address is
    confirmed, and a later confirmation reaches every order that waits for this user.
    """

    noting = State()
    requesting = State()
    waiting = State()
    creating = State()
    ready = State()
    settled = State(final=True)
    failed = State(final=True)
    cancelled = State(final=True)

    order_ref: str
    user_ref: str = ""
    email: str = ""
    version: int = 0
    systems: list[str] = []
    plans: list[str] = []
    created: list[str] = []
    cycle: int = 0
    """The opt-in cycle this order waits for."""
    ended_cycle: int = 0
    ended_because: str = ""
    """The latest cycle that is known to have ended without a confirmation, and why."""

    # ------------------------------------------------------------------------------ the two facts

    @on(AccountsNeeded, starts=True, goto=(noting, settled))
    def begin(self, event: AccountsNeeded) -> None:
        if not event.systems:
            self.goto(self.settled)
            return
        self.user_ref, self.email, self.version = event.user_ref, event.email, event.version
        self.systems, self.plans = event.systems, event.plans
        self.correlate("user_ref", event.user_ref)
        self.send(RequireAccounts(self.order_ref, self.user_ref, self.systems))
        self.goto(self.noting)

    @on_done(RequireAccounts, when=noting, goto=requesting)
    def ask(self) -> None:
        self.send(RequestOptIn(self.user_ref, self.email, self.version))

    @on(OptInPending, key="user_ref", when=requesting, goto=(waiting, failed), missing="ignore")
    def wait(self, event: OptInPending) -> None:
        self.cycle = event.cycle
        if self.ended_cycle >= event.cycle:  # the end of the cycle was faster than the answer
            self.block("failed", self.ended_because)
            self.goto(self.failed)
            return
        self.set_timeout("silence", after=ASK_AGAIN)
        self.goto(self.waiting)

    @on_timeout("silence", when=waiting, goto=requesting)
    def ask_again(self) -> None:
        self.send(RequestOptIn(self.user_ref, self.email, self.version))

    @on(
        EmailConfirmed,
        key="user_ref",
        when=(requesting, waiting),
        goto=(requesting, waiting, creating),
        missing="ignore",
    )
    def create(self, event: EmailConfirmed) -> None:
        """All systems are asked at once."""
        if event.version < self.version:
            return  # of an address that is not the user's any more
        self.cancel_timeout("silence")
        for system, plan in zip(self.systems, self.plans, strict=True):
            order, user = self.order_ref, self.user_ref
            match system:
                case "billing":
                    self.send(
                        CreateBillingAccount(order, user, plan),
                        undo=ReleaseBillingAccount(order, user),
                    )
                case "shipping":
                    self.send(
                        CreateShippingAccount(order, user, plan),
                        undo=ReleaseShippingAccount(order, user),
                    )
                case "loyalty":
                    self.send(
                        CreateLoyaltyAccount(order, user, plan),
                        undo=ReleaseLoyaltyAccount(order, user),
                    )
                case _:
                    raise ValueError(f"order {order} names the unknown system {system!r}")
        self.goto(self.creating)

    # ----------------------------------------------------------------------------------- the ends

    @on(RemoteAccountCreated, when=creating, goto=(creating, ready))
    def note_account(self, event: RemoteAccountCreated) -> None:
        self.created.append(event.system)
        if len(self.created) == len(self.systems):
            self.send(MarkOrderReady(self.order_ref))
            self.set_timeout("settled", after=CANCELLABLE)
            self.goto(self.ready)

    @on_timeout("settled", when=ready, goto=settled)
    def settle(self) -> None:
        """Too late to cancel: the accounts stay."""

    @on(
        OptInExpired,
        key="user_ref",
        when=(requesting, waiting),
        goto=(requesting, waiting, failed),
        missing="ignore",
    )
    def expire(self, event: OptInExpired) -> None:
        self.opt_in_ended(event.cycle, "nobody confirmed the address in time")

    @on(
        OptInMailRefused,
        key="user_ref",
        when=(requesting, waiting),
        goto=(requesting, waiting, failed),
        missing="ignore",
    )
    def give_up(self, event: OptInMailRefused) -> None:
        self.opt_in_ended(event.cycle, f"the address cannot be reached: {event.reason}")

    @on_failure(
        RequireAccounts,
        RequestOptIn,
        CreateBillingAccount,
        CreateShippingAccount,
        CreateLoyaltyAccount,
        MarkOrderReady,
        when=(noting, requesting, waiting, creating, ready),
        goto=failed,
    )
    def fail(self, failure: CommandFailed) -> None:
        self.block("failed", f"{failure.command_type}: {failure.reason}")

    @on(
        OrderCancelled,
        starts=True,
        when=(noting, requesting, waiting, creating, ready),
        goto=cancelled,
    )
    def cancel(self) -> None:
        """Starts an instance too: what comes after the cancellation of its order has no effect."""
        self.block("cancelled", "the order was cancelled")

    # ------------------------------------------------------------------------------------ in common

    def opt_in_ended(self, cycle: int, reason: str) -> None:
        if self.message.in_reply_to or (self.cycle and cycle >= self.cycle):
            self.block("failed", reason)
            self.goto(self.failed)
        elif cycle > self.ended_cycle:
            self.ended_cycle, self.ended_because = cycle, reason

    def block(self, outcome: str, reason: str) -> None:
        """Tell the order, and give back what it has."""
        self.send(BlockOrder(self.order_ref, outcome, reason))
        self.compensate(reason)
