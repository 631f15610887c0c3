"""The tables of the accounts service: what each order holds on to, and the accounts themselves.

One account per user and system, shared by all orders that need it; a requirement is one order's
hold on it.
"""

from enum import StrEnum

from sqlalchemy import BigInteger, Index, String, exists, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sagacity import RecordsEvents


class Tables(DeclarativeBase):
    """Everything that only this service reads and writes."""


metadata = Tables.metadata


class Hold(StrEnum):
    """What an order's requirement has come to."""

    REQUIRED = "required"
    CREATING = "creating"
    """A create of this order may reach the remote system."""
    ACTIVE = "active"
    REFUSED = "refused"
    RELEASED = "released"


HOLDING = (Hold.CREATING, Hold.ACTIVE)
"""Requirements in these states keep an account alive."""


class AccountState(StrEnum):
    """What is known of one remote account."""

    ABSENT = "absent"
    CREATING = "creating"
    """It may exist: a create was sent and its answer is not here."""
    ACTIVE = "active"
    DELETING = "deleting"
    """It may be gone: a delete was sent and its answer is not here."""


class Requirement(Tables):
    """One order's need of one account."""

    __tablename__ = "accounts_requirement"
    __table_args__ = (Index("accounts_requirement_of", "user_ref", "system", "state"),)

    order_ref: Mapped[str] = mapped_column(String(40), primary_key=True)
    system: Mapped[str] = mapped_column(String(40), primary_key=True)
    user_ref: Mapped[str] = mapped_column(String(40))
    state: Mapped[str] = mapped_column(String(16), default=Hold.REQUIRED)


class RemoteAccount(RecordsEvents, Tables):
    """A user's account in one system. Its row is the lock for the account and all holds on it."""

    __tablename__ = "accounts_remote_account"

    user_ref: Mapped[str] = mapped_column(String(40), primary_key=True)
    system: Mapped[str] = mapped_column(String(40), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), default=AccountState.ABSENT)
    generation: Mapped[int] = mapped_column(default=0)
    """Grows when an account that was deleted is made again: part of the idempotency key."""
    plan: Mapped[str] = mapped_column(String(40), default="")
    """What this generation was asked for; equal in every attempt."""
    remote_id: Mapped[str | None] = mapped_column(String(200))
    attempts: Mapped[int] = mapped_column(default=0)
    """Failed attempts of the call under way."""
    error: Mapped[str] = mapped_column(String(500), default="")
    lease: Mapped[str] = mapped_column(String(32), default="")
    """Names the one call to the remote system that may be under way; empty without one."""
    lease_until: Mapped[int] = mapped_column(BigInteger, default=0)
    """Microseconds since 1970, UTC: from then on the call is over, whatever became of it."""

    def event_subject(self) -> str:
        return f"RemoteAccount/{self.system}/{self.user_ref}"


async def locked_account(session: AsyncSession, user_ref: str, system: str) -> RemoteAccount:
    """The row of an account, locked until the session's transaction ends; a new one if needed."""

    async def found() -> RemoteAccount | None:
        return await session.get(
            RemoteAccount, (user_ref, system), with_for_update=True, populate_existing=True
        )

    account = await found()
    if account is None:
        fresh = RemoteAccount(
            user_ref=user_ref,
            system=system,
            state=AccountState.ABSENT,
            generation=0,
            plan="",
            remote_id=None,
            attempts=0,
            error="",
            lease="",
            lease_until=0,
        )
        try:
            async with session.begin_nested():
                session.add(fresh)
        except IntegrityError:  # somebody else was first, and has committed
            account = await found()
            assert account is not None
            return account
        return fresh
    return account


async def requirement_of(session: AsyncSession, order_ref: str, system: str) -> Requirement | None:
    """One order's need, locked too: always after the account."""
    return await session.get(
        Requirement, (order_ref, system), with_for_update=True, populate_existing=True
    )


async def is_held_by_others(session: AsyncSession, account: RemoteAccount, order_ref: str) -> bool:
    """Whether an order other than this one holds the account, or is about to."""
    others = exists().where(
        Requirement.user_ref == account.user_ref,
        Requirement.system == account.system,
        Requirement.order_ref != order_ref,
        Requirement.state.in_(HOLDING),
    )
    return bool((await session.execute(select(others))).scalar_one())
