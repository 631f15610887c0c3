"""Figures of the day. The batch's last step calls this directly: it is one service's own business, in
the same transaction, and nobody else would listen to an event.
"""

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from examples.batch_import.importing.tables import Batch, DayStatistics


async def count_batch(session: AsyncSession, batch: Batch, now: datetime) -> None:
    """Add a finished batch to the figures of its day and source."""
    key = {"day": f"{now:%Y-%m-%d}", "source": batch.source}
    figures = await session.get(DayStatistics, key, with_for_update=True)
    if figures is None:
        figures = DayStatistics(**key, batches=0, records=0, seconds=0.0)
        session.add(figures)
    figures.batches += 1
    figures.records += batch.records
    figures.seconds += (now - batch.received_at).total_seconds()
