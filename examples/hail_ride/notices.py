"""What passengers were told, one row for each notice."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.hail_ride.messages import NotifyPassenger
from sagacity import Context, handles


class Tables(DeclarativeBase):
    pass


class Notice(Tables):
    __tablename__ = "notices"
    id: Mapped[str] = mapped_column(primary_key=True)
    passenger: Mapped[str]
    text: Mapped[str]


@handles(NotifyPassenger)
async def notify(command: NotifyPassenger, context: Context) -> None:
    # The command's id is the row's: the same command again can tell nobody twice.
    context.session.add(
        Notice(id=context.command_id, passenger=command.passenger, text=command.text)
    )
