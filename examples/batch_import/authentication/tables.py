"""The tables of the authentication service: what is known of a user, and each opt-in cycle."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum

from sqlalchemy import BigInteger, String, UniqueConstraint
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.batch_import.authentication.tokens import (
    cycle_id,
    message_id_of,
    token_hash,
    token_of,
)
from examples.batch_import.messages import EmailConfirmed, OptInExpired, OptInRequested
from sagacity import RecordsEvents


class Tables(DeclarativeBase):
    """Everything that only this service reads and writes."""


metadata = Tables.metadata


class OptInState(StrEnum):
    """Where one opt-in cycle stands."""

    REQUESTED = "requested"
    SENDING = "sending"
    """A mail may have left; if it has, it is the one of this cycle."""
    MAILED = "mailed"
    CONFIRMED = "confirmed"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    """The address changed before anybody confirmed."""
    UNDELIVERABLE = "undeliverable"


PENDING = frozenset({OptInState.REQUESTED, OptInState.SENDING, OptInState.MAILED})
"""The states in which the token of a cycle is good for something."""


class KnownUser(Tables):
    """The address of a user, as far as this service has heard. Its row is the lock for all below."""

    __tablename__ = "authentication_user"

    user_ref: Mapped[str] = mapped_column(String(40), primary_key=True)
    email: Mapped[str] = mapped_column(String(254), default="")
    version: Mapped[int] = mapped_column(BigInteger, default=-1)
    """`users.version` that came with the address; -1 before any came."""
    cycle: Mapped[int] = mapped_column(default=0)
    """The number of the latest opt-in cycle; 0 before the first."""


class OptIn(RecordsEvents, Tables):
    """One opt-in cycle: one address, one token, one mail."""

    __tablename__ = "authentication_optin"
    __table_args__ = (UniqueConstraint("user_ref", "cycle"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_ref: Mapped[str] = mapped_column(String(40))
    cycle: Mapped[int]
    email: Mapped[str] = mapped_column(String(254))
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    message_id: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(16), default=OptInState.REQUESTED)
    reason: Mapped[str] = mapped_column(String(500), default="")
    requested_at: Mapped[int] = mapped_column(BigInteger)
    """All times are microseconds since 1970, UTC."""
    expires_at: Mapped[int] = mapped_column(BigInteger)
    sent_at: Mapped[int | None] = mapped_column(BigInteger)
    confirmed_at: Mapped[int | None] = mapped_column(BigInteger)

    @classmethod
    def begin(
        cls,
        user: KnownUser,
        now: datetime,
        *,
        secret: str,
        expires: timedelta,
        reminder: timedelta | None,
    ) -> "OptIn":
        """The next cycle of a user, to be added to the session that holds the user's lock."""
        user.cycle += 1
        token = token_of(secret, user.user_ref, user.cycle, user.email)
        cycle = cls(
            id=cycle_id(user.user_ref, user.cycle),
            user_ref=user.user_ref,
            cycle=user.cycle,
            email=user.email,
            token_hash=token_hash(token),
            message_id=message_id_of(user.user_ref, user.cycle),
            state=OptInState.REQUESTED,
            requested_at=microseconds(now),
            expires_at=microseconds(now + expires),
        )
        remind_at = now + reminder if reminder is not None else None
        cycle.record(OptInRequested(user.user_ref, user.cycle, now + expires, remind_at))
        return cycle

    def event_subject(self) -> str:
        return f"OptIn/{self.user_ref}"  # the events of all cycles of a user leave in order

    def is_pending(self, now: datetime) -> bool:
        """Whether somebody may still confirm."""
        return self.state in PENDING and microseconds(now) < self.expires_at

    def confirm(self, user: KnownUser, now: datetime) -> None:
        """The user followed the link."""
        self.state = OptInState.CONFIRMED
        self.confirmed_at = microseconds(now)
        self.record(EmailConfirmed(user.user_ref, self.email, user.version, self.cycle))

    def expire(self) -> None:
        """Nobody followed the link in time."""
        self.state = OptInState.EXPIRED
        self.record(OptInExpired(self.user_ref, self.cycle))


async def locked_user(session: AsyncSession, user_ref: str) -> KnownUser:
    """The row of a user, locked until the session's transaction ends; a new one if there is none."""

    async def found() -> KnownUser | None:
        return await session.get(KnownUser, user_ref, with_for_update=True, populate_existing=True)

    user = await found()
    if user is None:
        fresh = KnownUser(user_ref=user_ref, email="", version=-1, cycle=0)
        try:
            async with session.begin_nested():
                session.add(fresh)
        except IntegrityError:  # somebody else was first, and has committed
            user = await found()
            assert user is not None
            return user
        return fresh
    return user


async def cycle_of(session: AsyncSession, user_ref: str, cycle: int) -> OptIn | None:
    """One cycle, read anew: lock the user first."""
    return await session.get(OptIn, cycle_id(user_ref, cycle), populate_existing=True)


def microseconds(moment: datetime) -> int:
    """An aware time as microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment_of(at: int) -> datetime:
    """The aware time of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=at)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
