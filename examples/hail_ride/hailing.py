"""The domain that hails rides. It knows neither drivers, nor notices, nor who listens."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.hail_ride.messages import (
    CouldNotHail,
    DriverFound,
    FindDriver,
    NotifyPassenger,
    RequestRide,
    RideHailed,
)
from sagacity import Context, RecordsEvents, Saga, State, handles, on, on_done, on_failure
from sagacity.backends.sql.session import SagaSession
from sagacity.listeners import Announces

SERVED = ("Mission", "Castro", "Sunset")


class Tables(DeclarativeBase):
    pass


class Ride(RecordsEvents, Tables):
    """A ride that was asked for."""

    __tablename__ = "rides"
    id: Mapped[str] = mapped_column(primary_key=True)
    passenger: Mapped[str]
    hailed: Mapped[bool]

    @classmethod
    def hail(cls, ride: str, passenger: str, pickup: str) -> Ride:
        """The entity says what happened; it has no way to send it anywhere."""
        if pickup in SERVED:
            made = cls(id=ride, passenger=passenger, hailed=True)
            made.record(RideHailed(ride, passenger, pickup))
        else:
            made = cls(id=ride, passenger=passenger, hailed=False)
            made.record(CouldNotHail(ride, passenger, f"we do not serve {pickup}"))
        return made


# --- form 1: an object for one execution, whose caller attaches what is to happen ----------------


class HailRide(Announces):
    """Hails one ride, commits, and announces how it went."""

    def __init__(self, sessions: async_sessionmaker[SagaSession]) -> None:
        self.sessions = sessions

    async def __call__(self, ride: str, passenger: str, pickup: str) -> None:
        async with self.sessions() as session, session.begin():
            made = await hail(session, ride, passenger, pickup)
            outcome = made.pending_events if made else ()
        for event in outcome:  # only now: nobody hears of what was not committed
            await self.announce(event)


async def hail(session: AsyncSession, ride: str, passenger: str, pickup: str) -> Ride | None:
    """Every way in ends here: the HTTP route, the command line, and the command below."""
    if await session.get(Ride, ride) is not None:
        return None
    made = Ride.hail(ride, passenger, pickup)
    session.add(made)
    return made


@handles(RequestRide)
async def request_ride(command: RequestRide, context: Context) -> None:
    await hail(context.session, command.ride, command.passenger, command.pickup)


# --- form 3: over the bus, step by step, each committed before the next begins -------------------


class Hailing(Saga, key="ride"):
    """Finds a driver for a hailed ride and tells the passenger, found or not found."""

    searching = State()
    telling = State()
    told = State(final=True)

    ride: str
    passenger: str = ""
    driver: str = ""

    @on(RideHailed, starts=True, goto=searching)
    def search(self, event: RideHailed) -> None:
        self.passenger = event.passenger
        self.send(FindDriver(event.ride, event.pickup))

    @on(DriverFound, when=searching, goto=telling)
    def found(self, event: DriverFound) -> None:
        self.driver = event.driver
        self.send(NotifyPassenger(self.ride, self.passenger, f"{event.driver} is on the way"))

    @on_failure(FindDriver, when=searching, goto=telling)
    def not_found(self) -> None:
        self.send(NotifyPassenger(self.ride, self.passenger, "sorry, nobody drives"))

    @on_done(NotifyPassenger, when=telling, goto=told)
    def done(self) -> None:
        pass
