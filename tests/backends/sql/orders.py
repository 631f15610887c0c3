"""A small domain for the tests of sessions, and what a second connection sees of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import ForeignKey, func, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sagacity.backends.sql.database import READ_ONLY, open_engine
from sagacity.backends.sql.tables import dead_letter, metadata, outbox, outbox_pending
from sagacity.codec import envelope_from
from sagacity.core.delivery import Envelope
from sagacity.core.messages import Event
from sagacity.recording import RecordsEvents


class Placed(Event, topic="orders"):
    ref: str


class Renamed(Event, topic="orders"):
    ref: str


class LineAdded(Event, topic="orders"):
    product: str


class Removed(Event, topic="orders"):
    ref: str


class Noted(Event, topic="orders"):
    text: str


class Model(DeclarativeBase):
    pass


class Order(RecordsEvents, Model):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[str] = mapped_column(unique=True)
    version: Mapped[int] = mapped_column()
    lines: Mapped[list[Line]] = relationship(cascade="all, delete-orphan")
    __mapper_args__ = {"version_id_col": version}

    @classmethod
    def place(cls, ref: str) -> Order:
        order = cls(ref=ref)
        order.record(Placed(ref))
        return order

    def note(self, text: str) -> None:
        """Records without any change of the entity."""
        self.record(Noted(text))

    def rename(self, ref: str) -> None:
        self.ref = ref
        self.record(Renamed(ref))

    def add_line(self, product: str) -> None:
        self.lines.append(Line(product=product))
        self.record(LineAdded(product))


class Line(RecordsEvents, Model):
    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    product: Mapped[str]


class Seat(RecordsEvents, Model):
    __tablename__ = "seats"
    train: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


class Database:
    """The database of one test, read over a connection of its own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def read(self, statement: Any) -> list[Any]:
        async with self.engine.connect() as connection:
            await connection.execution_options(**{READ_ONLY: True})
            return list((await connection.execute(statement)).all())

    async def envelopes(self) -> list[Envelope]:
        rows = await self.read(select(outbox.c.headers, outbox.c.body).order_by(outbox.c.seq))
        return [envelope_from(row.headers, row.body) for row in rows]

    async def published(self) -> list[str]:
        """Class names of the events in the outbox, all of them pending."""
        rows = await self.read(
            select(outbox.c.message_type)
            .join(outbox_pending, outbox_pending.c.seq == outbox.c.seq)
            .order_by(outbox.c.seq)
        )
        assert len(rows) == len(await self.envelopes())
        return [row.message_type.removeprefix("orders.") for row in rows]

    async def refs(self) -> list[str]:
        return [row.ref for row in await self.read(select(Order.ref).order_by(Order.id))]

    async def failures(self) -> list[Any]:
        return await self.read(select(dead_letter).order_by(dead_letter.c.id))

    async def count(self, entity: type[Model]) -> int:
        return int((await self.read(select(func.count()).select_from(entity)))[0][0])


@asynccontextmanager
async def fresh_database(url: str) -> AsyncIterator[Database]:
    """The tables of the store and of the domain, in an empty database."""
    engine = open_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.run_sync(Model.metadata.create_all)
        yield Database(engine)
    finally:
        await engine.dispose()
