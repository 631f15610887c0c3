"""One user's way to a confirmed address."""

from datetime import datetime

from examples.batch_import.messages import (
    EmailConfirmed,
    ExpireOptIn,
    OptInExpired,
    OptInMailRefused,
    OptInMailSent,
    OptInRequested,
    RemindOptIn,
    SendOptInMail,
)
from sagacity import Saga, State, on, on_done, on_failure, on_timeout


class OptInSaga(Saga, key="user_ref", restartable=True):
    """Ask a user to confirm an address: one mail for each cycle, and an end to each cycle.

    The cycles themselves are rows of this service: a new one takes the place of one under way, and
    begins the saga anew after the last one has ended.
    """

    requested = State()
    mailed = State()
    confirmed = State(final=True)
    expired = State(final=True)
    undeliverable = State(final=True)

    user_ref: str
    cycle: int = 0
    remind_at: datetime | None = None

    @on(OptInRequested, starts=True, when=(requested, mailed), goto=requested)
    def ask(self, event: OptInRequested) -> None:
        """The events of one user come in the order of the cycles, so this is the latest one."""
        self.cycle, self.remind_at = event.cycle, event.remind_at
        self.cancel_timeout("reminder")
        self.set_timeout("expiry", at=event.expires_at)
        self.send(SendOptInMail(self.user_ref, self.cycle))

    @on(OptInMailSent, when=requested, goto=(requested, mailed), missing="ignore")
    def note_mail(self, event: OptInMailSent) -> None:
        if event.cycle == self.cycle:
            self.goto(self.mailed)
            if self.remind_at is not None:
                self.set_timeout("reminder", at=self.remind_at)

    @on_timeout("reminder", when=mailed)
    def remind(self) -> None:
        self.send(RemindOptIn(self.user_ref, self.cycle))

    @on_timeout("expiry", when=(requested, mailed))
    def expire(self) -> None:
        self.send(ExpireOptIn(self.user_ref, self.cycle))

    @on(
        EmailConfirmed,
        when=(requested, mailed),
        goto=(requested, mailed, confirmed),
        missing="ignore",
    )
    def confirm(self, event: EmailConfirmed) -> None:
        if event.cycle == self.cycle:
            self.goto(self.confirmed)

    @on(OptInExpired, when=(requested, mailed), goto=(requested, mailed, expired), missing="ignore")
    def end(self, event: OptInExpired) -> None:
        if event.cycle == self.cycle:
            self.goto(self.expired)

    @on(
        OptInMailRefused,
        when=(requested, mailed),
        goto=(requested, mailed, undeliverable),
        missing="ignore",
    )
    def give_up(self, event: OptInMailRefused) -> None:
        if event.cycle == self.cycle:
            self.goto(self.undeliverable)

    @on_done(SendOptInMail, RemindOptIn, ExpireOptIn, when=(requested, mailed))
    @on_failure(SendOptInMail, RemindOptIn, when=(requested, mailed))
    def wait(self) -> None:
        """Nothing was to be sent any more, or a dead letter tells why it could not be: the cycle
        goes on until it is confirmed or its time is over."""
