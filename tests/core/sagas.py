"""Sagas that several tests of the core share. Never changed by a test."""

from __future__ import annotations

from datetime import timedelta

from sagacity.core.messages import Command, CommandFailed, Event
from sagacity.core.saga import Saga, State, on, on_done, on_failure, on_timeout

# ------------------------------------------------------------------------- accounts, as in README


class AccountsNeeded(Event, topic="orders"):
    order_ref: str
    user_ref: str
    systems: list[str]


class EmailConfirmed(Event, topic="users"):
    user_ref: str


class CreateAccount(Command, topic="accounts"):
    user_ref: str
    system: str


class ReleaseAccount(Command, topic="accounts"):
    user_ref: str
    system: str


class AccountCreated(Event, topic="accounts"):
    system: str


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

    @on(AccountsNeeded, starts=True, goto=waiting)
    def begin(self, event: AccountsNeeded) -> None:
        self.user_ref, self.systems = event.user_ref, event.systems
        self.correlate("user_ref", event.user_ref)
        self.set_timeout("opt-in", after=timedelta(days=14))

    @on(EmailConfirmed, key="user_ref", when=waiting, goto=creating)
    def create(self, event: EmailConfirmed) -> None:
        for system in self.systems:
            self.send(
                CreateAccount(self.user_ref, system), undo=ReleaseAccount(self.user_ref, system)
            )

    @on(AccountCreated, when=creating, goto=(creating, ready))
    def created_one(self, event: AccountCreated) -> None:
        self.created.append(event.system)
        if not self.pending:
            self.goto(self.ready)

    @on_failure(CreateAccount, when=creating, goto=refused)
    @on_timeout("opt-in", when=waiting, goto=refused)
    def give_up(self) -> None:
        self.compensate("accounts could not be created")


# --------------------------------------------------------------------------------- a trip, undone


class TripRequested(Event, topic="trips"):
    trip: str


class Book(Command, topic="bookings"):
    what: str


class Release(Command, topic="bookings"):
    what: str


class Notify(Command, topic="mail"):
    text: str


class TripChanged(Event, topic="trips"):
    trip: str


class Trip(Saga, key="trip"):
    """Books three things at once; done when all are."""

    booking = State()
    booked = State(final=True)

    trip: str
    notified: bool = False

    @on(TripRequested, starts=True, goto=booking)
    def begin(self) -> None:
        for what in ("flight", "hotel", "car"):
            self.send(Book(what), undo=Release(what))
        self.send(Notify("requested"))

    @on_done(Book, Notify, when=booking, goto=(booking, booked))
    def one_done(self) -> None:
        self.goto(self.booking if self.pending else self.booked)

    @on(TripChanged, when=booking)
    def changed(self) -> None:
        self.notified = True


class ParallelTrip(Saga, key="trip", parallel=True):
    """As `Trip`, but everything is undone at once."""

    booking = State()
    booked = State(final=True)

    trip: str

    @on(TripRequested, starts=True, goto=booking)
    def begin(self) -> None:
        for what in ("flight", "hotel", "car"):
            self.send(Book(what), undo=Release(what))

    @on_done(Book, when=booking, goto=(booking, booked))
    def one_done(self) -> None:
        self.goto(self.booking if self.pending else self.booked)


# ---------------------------------------------------------------------- a notebook of what it got


class Opened(Event, topic="notes"):
    book: str


class Noted(Event, topic="notes"):
    book: str
    text: str = ""


class Sealed(Event, topic="notes"):
    book: str


class Reminded(Event, topic="notes"):
    book: str
    after_s: int


class Store(Command, topic="archive"):
    text: str


class Stored(Event, topic="notes"):
    book: str
    text: str


class NoteTaken(Event, topic="notes.out"):
    text: str


class Notebook(Saga, key="book"):
    """Writes down what it gets once it is unlocked; early notes wait. "bad" notes raise."""

    locked = State()
    unlocked = State()
    sealed = State(final=True)

    book: str
    notes: list[str] = []
    reminders: int = 0

    @on(Opened, starts=True, goto=locked)
    def begin(self) -> None:
        self.set_timeout("lock", after=timedelta(hours=1))

    @on(Stored, when=locked, goto=unlocked)
    def unlock(self) -> None:
        self.cancel_timeout("lock")

    @on(Noted, when=unlocked)
    def note(self, event: Noted) -> None:
        if event.text.startswith("bad"):
            raise ValueError(event.text.replace("surrogate", "\ud800"))
        self.notes.append(event.text)
        self.publish(NoteTaken(event.text))

    @on(Reminded, when=(locked, unlocked))
    def remind(self, event: Reminded) -> None:
        self.set_timeout("reminder", after=timedelta(seconds=event.after_s))

    @on_timeout("reminder", when=unlocked)
    def reminded(self) -> None:
        self.reminders += 1
        self.send(Store(f"reminder {self.reminders}"))

    @on_timeout("lock", when=locked, goto=sealed)
    def abandoned(self) -> None: ...

    @on_failure(Store, when=unlocked)
    def not_stored(self, failure: CommandFailed) -> None:
        self.notes.append(f"not stored: {failure.reason}")

    @on(Sealed, when=unlocked, goto=sealed)
    def seal(self) -> None: ...


# -------------------------------------------------------------------------------- three facts, any


class Asked(Event, topic="facts"):
    case: str


class Paid(Event, topic="facts"):
    case: str


class Packed(Event, topic="facts"):
    case: str


class Checked(Event, topic="facts"):
    case: str


class Ship(Command, topic="shipping"):
    facts: list[str]


class Shipping(Saga, key="case"):
    """Ships when it was paid, packed and checked, in whatever order."""

    waiting = State()
    shipped = State(final=True)

    case: str
    facts: list[str] = []

    @on(Asked, starts=True, goto=waiting)
    def begin(self) -> None: ...

    @on(Paid, Packed, Checked, when=waiting, goto=(waiting, shipped))
    def fact(self, event: Paid | Packed | Checked) -> None:
        self.facts = sorted({*self.facts, type(event).__name__})
        if len(self.facts) == 3:
            self.send(Ship(self.facts))
            self.goto(self.shipped)
