"""What the parts say to each other. Nobody imports another part, everybody imports this."""

from __future__ import annotations

from sagacity import Command, Event


class RequestRide(Command, topic="hailing"):
    """Hail a ride for a passenger; the same `ride` twice is one ride."""

    ride: str
    passenger: str
    pickup: str


class RideHailed(Event, topic="rides"):
    """A ride was asked for. Whether there is a driver, nobody knows yet."""

    ride: str
    passenger: str
    pickup: str


class CouldNotHail(Event, topic="rides"):
    """A ride was asked for and refused. A failure is an event like any other."""

    ride: str
    passenger: str
    reason: str


class FindDriver(Command, topic="drivers"):
    """Find somebody who drives."""

    ride: str
    pickup: str


class DriverFound(Event, topic="drivers"):
    """Somebody drives."""

    ride: str
    driver: str


class NotifyPassenger(Command, topic="notices"):
    """Tell the passenger how it ended."""

    ride: str
    passenger: str
    text: str
