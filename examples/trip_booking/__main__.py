"""Four trips, run to the end in this process: python -m examples.trip_booking."""

import asyncio
import json
import tempfile

from examples.trip_booking.service import TripBooking, book, trips
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.session import session_factory
from sagacity.testing import Inline
from sagacity.testing.clock import VirtualClock

WISHES = [("Ann", "Lisbon"), ("Ann", "Quito"), ("Ben", "Quito"), ("Ann", "Ushuaia")]


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        clock = VirtualClock()
        store = SqlStore(f"sqlite+aiosqlite:///{directory}/trips.db", clock=clock)
        async with Inline(trips, store=store, clock=clock) as app:
            sessions = session_factory(store, service=trips)
            booked = [await book(sessions, *wish) for wish in WISHES]
            await app.run()
            for (traveller, destination), trip in zip(WISHES, booked, strict=True):
                seen = await app.saga(TripBooking, trip)
                print(f"{traveller} to {destination}: {seen.state}, {seen.status}")
                for row in await app.history(TripBooking, trip):
                    effects = json.loads(row.effects)
                    came = row.message_type.rpartition(".")[2]
                    sent = ", ".join(
                        name.rpartition(".")[2] for name, *_ in effects.get("sent", [])
                    )
                    why = f"  because: {effects['reason']}" if "reason" in effects else ""
                    print(f"  {came:<13} {row.state_to:<9} {sent}{why}".rstrip())
        await store.close()


if __name__ == "__main__":
    asyncio.run(main())
