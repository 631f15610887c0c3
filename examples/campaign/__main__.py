"""Two campaigns, run to the end in this process: python -m examples.campaign."""

import asyncio
import tempfile

from examples.campaign.service import Campaign, CampaignPublishing, Tables, campaigns, publishing
from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.session import session_factory
from sagacity.testing import Inline
from sagacity.testing.clock import VirtualClock

CAMPAIGNS = {"spring": "Boots for walking", "lottery": "Free money for everybody"}


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        clock = VirtualClock()
        store = SqlStore(f"sqlite+aiosqlite:///{directory}/campaigns.db", clock=clock)
        async with Inline(campaigns, publishing, store=store, clock=clock) as app:
            async with store.engine.begin() as connection:
                await connection.run_sync(Tables.metadata.create_all)
            sessions = session_factory(store, service=campaigns)
            async with sessions() as session, session.begin():
                for name, slogan in CAMPAIGNS.items():
                    campaign = Campaign(id=name, slogan=slogan)
                    session.add(campaign)
                    campaign.activate()
            await app.run()
            for name in CAMPAIGNS:
                async with sessions() as session:
                    campaign = await session.get_one(Campaign, name)
                print(f"{name}: {campaign.status} ({campaign.note})")
                for row in await app.history(CampaignPublishing, name):
                    came = row.message_type.rpartition(".")[2]
                    print(f"  {row.state_from or 'new':>10} -> {row.state_to:<10}  on {came}")
        await store.close()


if __name__ == "__main__":
    asyncio.run(main())
