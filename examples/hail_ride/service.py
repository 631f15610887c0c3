"""Puts the parts together: the only module that knows them all."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from examples.hail_ride import drivers, hailing, notices
from sagacity import Service

hailing_service = Service("hailing", sagas=[hailing.Hailing], handlers=[hailing.request_ride])
driver_service = Service("drivers", handlers=[drivers.find_driver])
notice_service = Service("notices", handlers=[notices.notify])
SERVICES = (hailing_service, driver_service, notice_service)


async def create_tables(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        for tables in (hailing.Tables, notices.Tables):
            await connection.run_sync(tables.metadata.create_all)
