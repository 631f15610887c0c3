"""The domain of drivers. It knows nothing of rides, passengers or who asks."""

from __future__ import annotations

from examples.hail_ride.messages import DriverFound, FindDriver
from sagacity import Refused, handles

WAITING = {"Mission": "Doc Brown", "Castro": "Marty"}


@handles(FindDriver)
async def find_driver(command: FindDriver) -> DriverFound:
    driver = WAITING.get(command.pickup)
    if driver is None:
        raise Refused(f"nobody waits near {command.pickup}")
    return DriverFound(command.ride, driver)
