"""The trip booking example: a process manager that loops, and cancels what it booked."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import msgspec
import pytest

from examples.trip_booking.service import (
    AskTraveller,
    CancelFlight,
    Desk,
    RouteFound,
    TripBooking,
    TripRequested,
    book,
    trips,
)
from sagacity import Service
from sagacity.backends.sql.session import session_factory
from sagacity.core.messages import message_type
from sagacity.testing import Inline
from tests.examples.two_ways import Way, running

WISHES = {
    "easy": ("Ann", "Lisbon"),
    "picky": ("Ann", "Quito"),
    "pickier": ("Ben", "Quito"),
    "homeless": ("Ann", "Ushuaia"),
    "nowhere": ("Ann", "Atlantis"),
}


class Ran(msgspec.Struct):
    """What came of the wishes, one after the other."""

    ends: dict[str, tuple[str, str]]
    stories: dict[str, list[tuple[str, str, str, str, str]]]
    messages: list[tuple[str, bytes, str]]
    flights: dict[tuple[str, str], str]


async def run(way: Way, store_url: str, bus_url: str) -> Ran:
    ends, stories = {}, {}
    async with running(way, [trips], store_url, bus_url) as at_work:
        sessions = session_factory(at_work.store, service=trips)
        for trip, (traveller, destination) in WISHES.items():
            assert await book(sessions, traveller, destination, trip=trip) == trip
            (instance,) = await at_work.finish(TripBooking, trip)
            ends[trip] = instance.state, str(instance.status)
            stories[trip] = await at_work.story(TripBooking, trip)
        desk: Desk = at_work.states[0]
        return Ran(ends, stories, await at_work.messages(), desk.flights)


@pytest.mark.requirement("R9", "R40")
@pytest.mark.asyncio
async def test_trips_end_the_same_inline_and_on_the_bus(
    store_url: str, sqlite_url: str, redis_url: str
) -> None:
    """Routes are asked for again and again, and flights are cancelled where there is no hotel."""
    inline = await run("inline", sqlite_url + ".inline", redis_url)
    bus = await run("bus", store_url, redis_url)
    assert bus == inline
    assert inline.ends == {
        "easy": ("booked", "completed"),
        "picky": ("booked", "completed"),
        "pickier": ("given_up", "completed"),
        "homeless": ("given_up", "compensated"),
        "nowhere": ("routing", "compensated"),
    }
    again = [handler for _, handler, *_ in inline.stories["picky"] if handler == "route_again"]
    assert len(again) == 2
    assert inline.flights == {
        ("easy", "Oslo-Lisbon"): "booked",
        ("picky", "Oslo-Madrid"): "booked",
        ("picky", "Madrid-Quito"): "booked",
        ("homeless", "Oslo-Madrid"): "cancelled",
        ("homeless", "Madrid-Ushuaia"): "cancelled",
    }
    cancel = message_type(CancelFlight).name
    assert [body for kind, body, _ in inline.messages if kind == cancel] == [
        b'{"leg":"Madrid-Ushuaia","trip":"homeless"}',
        b'{"leg":"Oslo-Madrid","trip":"homeless"}',
    ]


@pytest.mark.requirement("R40")
@pytest.mark.asyncio
async def test_each_start_makes_a_process_of_its_own() -> None:
    """Two equal wishes are two trips, each with an id that nobody had to think of."""
    async with Inline(trips) as app:
        first = await app.start(TripBooking, TripRequested("Ann", "Lisbon"))
        second = await app.start(TripBooking, TripRequested("Ann", "Lisbon"))
        await app.run()
        assert first != second
        assert (await app.saga(TripBooking, first)).state == "booked"
        assert (await app.saga(TripBooking, second)).state == "booked"


@pytest.mark.requirement("R40")
@pytest.mark.asyncio
async def test_a_traveller_who_never_answers_is_not_waited_for_for_ever() -> None:
    """After two days without an answer the trip is given up, and nothing is booked."""
    silent = Service(
        "trips",
        sagas=[TripBooking],
        handlers=[
            participant.function
            for participant in trips.commands.values()
            if participant.message is not AskTraveller
        ],
        lifespan=trips.lifespan,
    )
    async with Inline(silent) as app:
        trip = await app.start(TripBooking, TripRequested("Ann", "Lisbon"))
        await app.run()
        assert (await app.saga(TripBooking, trip)).state == "asking"
        assert app.messages(RouteFound) == [RouteFound(["Oslo", "Lisbon"])]
        await app.advance(timedelta(days=2))
        seen = await app.saga(TripBooking, trip)
        assert (seen.state, seen.status, seen.timeouts) == ("given_up", "completed", {})


def test_the_example_runs() -> None:
    """`python -m examples.trip_booking` shows how four trips went."""
    run = subprocess.run(
        [sys.executable, "-m", "examples.trip_booking"], check=True, capture_output=True, text=True
    )
    for line in (
        "Ann to Lisbon: booked, completed",
        "Ann to Quito: booked, completed",
        "Ben to Quito: given_up, completed",
        "Ann to Ushuaia: given_up, compensated",
    ):
        assert line in run.stdout
    assert run.stderr == ""
