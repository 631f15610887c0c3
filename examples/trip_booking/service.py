"""Trip booking, the process manager of *Learning Domain-Driven Design*, chapter 9.

A traveller's trip is routed until a route is accepted, or too many were rejected; then its flights are
booked, and then a hotel. Without a hotel the flights are cancelled, the last one first.

No event of the outside world starts it. Somebody books a trip, and the process gets an identity of its
own: `book` does that in the caller's transaction.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy.ext.asyncio import async_sessionmaker

from sagacity import (
    Command,
    CommandFailed,
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
)
from sagacity.backends.sql.session import SagaSession

ROUTES_MAX = 3

# ---------------------------------------------------------------------------------------- messages


class TripRequested(Event, topic="trips"):
    traveller: str
    destination: str


class FindRoute(Command, topic="routing"):
    destination: str
    rejected: list[list[str]]


class RouteFound(Event, topic="routing"):
    route: list[str]


class AskTraveller(Command, topic="travellers"):
    traveller: str
    route: list[str]


class RouteAccepted(Event, topic="travellers"):
    route: list[str]


class RouteRejected(Event, topic="travellers"):
    route: list[str]


class BookFlight(Command, topic="flights"):
    trip: str
    leg: str


class CancelFlight(Command, topic="flights"):
    trip: str
    leg: str


class FlightBooked(Event, topic="flights"):
    leg: str


class BookHotel(Command, topic="hotels"):
    trip: str
    city: str


class HotelBooked(Event, topic="hotels"):
    hotel: str


# ----------------------------------------------------------------------------- the process manager


class TripBooking(Saga):
    """Route a trip with its traveller, book the flights, then the hotel, or nothing at all."""

    routing = State()
    asking = State()
    flying = State()
    staying = State()
    booked = State(final=True)
    given_up = State(final=True)

    traveller: str = ""
    destination: str = ""
    rejected: list[list[str]] = []
    hotel: str = ""

    @on(TripRequested, starts=True, goto=routing)
    def begin(self, event: TripRequested) -> None:
        self.traveller, self.destination = event.traveller, event.destination
        self.find_route()

    def find_route(self) -> None:
        self.send(FindRoute(self.destination, self.rejected))

    @on(RouteFound, when=routing, goto=asking)
    def ask(self, event: RouteFound) -> None:
        self.send(AskTraveller(self.traveller, event.route))
        self.set_timeout("answer", after=timedelta(days=2))

    @on(RouteRejected, when=asking, goto=(routing, given_up))
    def route_again(self, event: RouteRejected) -> None:
        self.cancel_timeout("answer")
        self.rejected.append(event.route)
        if len(self.rejected) == ROUTES_MAX:
            self.goto(self.given_up)
        else:
            self.goto(self.routing)
            self.find_route()

    @on(RouteAccepted, when=asking, goto=flying)
    def book_flights(self, event: RouteAccepted) -> None:
        self.cancel_timeout("answer")
        for start, end in zip(event.route, event.route[1:], strict=False):
            trip, leg = self.key, f"{start}-{end}"
            self.send(BookFlight(trip, leg), undo=CancelFlight(trip, leg))

    @on(FlightBooked, when=flying, goto=(flying, staying))
    def book_hotel(self, _: FlightBooked) -> None:
        if not self.pending:  # every flight is booked
            self.goto(self.staying)
            self.send(BookHotel(self.key, self.destination))

    @on(HotelBooked, when=staying, goto=booked)
    def finish(self, event: HotelBooked) -> None:
        self.hotel = event.hotel

    @on_failure(BookFlight, BookHotel, when=(flying, staying), goto=given_up)
    def cancel(self, event: CommandFailed) -> None:
        self.compensate(event.reason)  # flights that were booked are cancelled, the last one first

    @on_timeout("answer", when=asking, goto=given_up)
    def no_answer(self) -> None: ...


# -------------------------------------------------------------------------------- who does the work


class Desk:
    """The world outside: timetables, what travellers like, and who has booked what."""

    def __init__(self) -> None:
        self.routes = {
            "Lisbon": [["Oslo", "Lisbon"]],
            "Quito": [
                ["Oslo", "Miami", "Quito"],
                ["Oslo", "Bogota", "Quito"],
                ["Oslo", "Madrid", "Quito"],
            ],
            "Ushuaia": [["Oslo", "Madrid", "Ushuaia"]],
        }
        self.avoided = {"Ann": {"Miami", "Bogota"}, "Ben": {"Miami", "Bogota", "Madrid"}}
        self.hotels = {"Lisbon": "Alfama", "Quito": "El Centro"}
        self.flights: dict[tuple[str, str], str] = {}


@asynccontextmanager
async def desk(_: Service) -> AsyncGenerator[Desk]:
    yield Desk()


@handles(FindRoute)
async def find_route(command: FindRoute, context: Context) -> RouteFound:
    for route in context.state.routes.get(command.destination, []):
        if route not in command.rejected:
            return RouteFound(route)
    raise Refused(f"no route to {command.destination}")


@handles(AskTraveller)
async def ask_traveller(command: AskTraveller, context: Context) -> RouteAccepted | RouteRejected:
    avoided = context.state.avoided.get(command.traveller, set())
    dislikes = avoided.intersection(command.route)
    return RouteRejected(command.route) if dislikes else RouteAccepted(command.route)


@handles(BookFlight)
async def book_flight(command: BookFlight, context: Context) -> FlightBooked:
    context.state.flights[command.trip, command.leg] = "booked"  # the same again, done again
    return FlightBooked(command.leg)


@handles(CancelFlight)
async def cancel_flight(command: CancelFlight, context: Context) -> None:
    context.state.flights[command.trip, command.leg] = "cancelled"


@handles(BookHotel)
async def book_hotel(command: BookHotel, context: Context) -> HotelBooked:
    if command.city not in context.state.hotels:
        raise Refused(f"no hotel in {command.city}")
    return HotelBooked(context.state.hotels[command.city])


trips = Service(
    "trips",
    sagas=[TripBooking],
    handlers=[find_route, ask_traveller, book_flight, cancel_flight, book_hotel],
    lifespan=desk,
)


async def book(
    sessions: async_sessionmaker[SagaSession], traveller: str, destination: str, *, trip: str = ""
) -> str:
    """Starts a trip, in a transaction that could hold the caller's own rows too; returns its id."""
    async with sessions() as session, session.begin():
        wanted = TripRequested(traveller, destination)
        return await trips.start(TripBooking, wanted, session=session, key=trip or None)
