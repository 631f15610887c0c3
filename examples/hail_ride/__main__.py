"""Three passengers, run to the end in this process: python -m examples.hail_ride."""

from __future__ import annotations

import asyncio
import tempfile

from sqlalchemy import select

from examples.hail_ride.analytics import Analytics
from examples.hail_ride.hailing import Hailing
from examples.hail_ride.notices import Notice
from examples.hail_ride.service import SERVICES, create_tables, hailing_service
from examples.hail_ride.ways_in import command_line
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.session import session_factory
from sagacity.listeners import Listeners
from sagacity.testing.clock import VirtualClock
from sagacity.testing.inline import Inline

PASSENGERS = {"ann": "Mission", "bob": "Sunset", "cid": "Alcatraz"}


async def main() -> None:
    application, analytics = Listeners(), Analytics()
    analytics.listen_to(application)
    with tempfile.TemporaryDirectory() as directory:
        clock = VirtualClock()
        store = SqlStore(f"sqlite+aiosqlite:///{directory}/rides.db", clock=clock)
        async with Inline(*SERVICES, store=store, clock=clock) as app:
            await create_tables(store.engine)
            sessions = session_factory(store, service=hailing_service)
            print("Hailing (each answered at once):")
            for passenger, pickup in PASSENGERS.items():
                asked = [passenger, pickup, "--ride", f"ride-{passenger}"]
                for line in await command_line(asked, sessions, application):
                    print(f"  {line}")
            print(f"Analytics: {dict(analytics.counts)}")
            await app.run()
            print("Told later, once each:")
            async with sessions() as session:
                for notice in await session.scalars(select(Notice).order_by(Notice.passenger)):
                    print(f"  {notice.passenger}: {notice.text}")
            for passenger in ("ann", "bob"):
                seen = await app.saga(Hailing, f"ride-{passenger}")
                print(f"Saga of {passenger}: {seen.state} ({seen.status})")
        await store.close()


if __name__ == "__main__":
    asyncio.run(main())
