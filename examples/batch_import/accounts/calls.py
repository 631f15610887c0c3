"""Who may call a remote system about one account, and what is on record before and after the call.

A call is made outside of any transaction. Before it, a short transaction notes what is about to be
tried and takes the lease of the account; so at most one call about an account is under way, in any
process, and whatever becomes of the process, the next one knows what may have happened.
"""

import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, TypeVar, cast
from uuid import uuid4

import anyio
import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.batch_import.accounts.tables import (
    HOLDING,
    AccountState,
    Hold,
    RemoteAccount,
    Requirement,
    is_held_by_others,
    locked_account,
    requirement_of,
)
from examples.batch_import.accounts_api import AccountsApi, Unavailable
from sagacity import Context, Event, Refused, Retry
from sagacity.backends.sql.session import SagaSession

T = TypeVar("T")

LOOK_AGAIN_S: Final = 0.05
RELEASE_RETRY: Final = Retry(
    attempts_max=int(os.environ.get("BATCH_IMPORT_RELEASE_ATTEMPTS") or 8),
    base_us=int(os.environ.get("BATCH_IMPORT_RELEASE_BACKOFF_MS") or 500) * 1000,
)


class Remotes(msgspec.Struct, frozen=True):
    """What handlers find as `context.state`."""

    apis: Mapping[str, AccountsApi]
    timeout_s: float
    """How long one call may take, all its requests together."""

    @property
    def lease_us(self) -> int:
        """A call has certainly ended when its lease has."""
        return int((self.timeout_s * 1.5 + 1) * 1_000_000)


class Busy(Exception):
    """Another call about this account is under way: try again later."""


class Lost(Exception):
    """The lease ran out during the call; what is true now must be looked at again."""


class Subject(msgspec.Struct, frozen=True):
    """What a command is about."""

    order_ref: str
    user_ref: str
    system: str


class Call(msgspec.Struct, frozen=True):
    """A call that may be made now; only its own lease may write down how it ended."""

    subject: Subject
    lease: str
    generation: int
    plan: str
    remote_id: str | None
    attempts: int
    """Failed attempts before this one; each may have been carried out all the same."""
    in_doubt: bool
    """A delete was tried before, and nobody knows whether the account is gone."""

    @property
    def key(self) -> str:
        """The same in every attempt to make this account, whichever order asks for it."""
        return f"{self.subject.system}/{self.subject.user_ref}/{self.generation}"


def remotes_of(context: Context) -> Remotes:
    return cast("Remotes", context.state)


async def claim_create(subject: Subject, plan: str, context: Context) -> Call | str:
    """The call to make, or the id of the account where it exists already; then the hold is active.

    Raises Refused where the order must not have the account any more, and Busy.
    """

    async def look(session: AsyncSession) -> Call | str | None:
        account = await locked_account(session, subject.user_ref, subject.system)
        need = await requirement_of(session, subject.order_ref, subject.system)
        if need is None or need.state == Hold.RELEASED:
            raise Refused(f"order {subject.order_ref} asks for no account in {subject.system}")
        if need.state == Hold.REFUSED:
            raise Refused(account.error or f"{subject.system} refused")
        if account.state == AccountState.ACTIVE:
            need.state = Hold.ACTIVE
            return account.remote_id or ""
        need.state = Hold.CREATING
        if is_leased(account):
            return None
        in_doubt = account.state == AccountState.DELETING
        if account.state == AccountState.ABSENT:
            _begin_generation(account, plan)
        return _leased(account, subject, context, in_doubt=in_doubt)

    return await _when_free(subject, context, look)


async def claim_release(subject: Subject, context: Context) -> Call | None:
    """The delete to make; None where the account stays or never was. Then the hold is released.

    Raises Busy.
    """

    async def look(session: AsyncSession) -> Call | bool | None:
        account = await locked_account(session, subject.user_ref, subject.system)
        need = await requirement_of(session, subject.order_ref, subject.system)
        if need is None or need.state not in HOLDING:
            if need is not None and need.state == Hold.REQUIRED:
                need.state = Hold.RELEASED
            return False
        kept = await is_held_by_others(session, account, subject.order_ref)
        if kept or account.state == AccountState.ABSENT:
            need.state = Hold.RELEASED
            return False
        if is_leased(account):
            return None
        account.state = AccountState.DELETING
        return _leased(account, subject, context)

    found = await _when_free(subject, context, look)
    return found if isinstance(found, Call) else None


async def _when_free(
    subject: Subject, context: Context, look: Callable[[AsyncSession], Awaitable[T | None]]
) -> T:
    ends = time.monotonic() + remotes_of(context).lease_us / 1e6
    while True:
        async with own_transaction(context) as session:
            found = await look(session)
        if found is not None:
            return found
        if time.monotonic() > ends:
            raise Busy(
                f"the account of {subject.user_ref} in {subject.system} is being worked on for "
                "another order"
            )
        await anyio.sleep(LOOK_AGAIN_S)


async def next_generation(call: Call, plan: str, context: Context) -> Call:
    """The call that makes a new account where the old one turned out to be gone."""
    async with own_transaction(context) as session:
        account, _ = await ended(session, call)
        _begin_generation(account, plan)
        account.lease = call.lease
        account.lease_until = _now_us() + remotes_of(context).lease_us
        return msgspec.structs.replace(
            call, generation=account.generation, plan=plan, remote_id=None, attempts=0
        )


def _begin_generation(account: RemoteAccount, plan: str) -> None:
    account.generation += 1
    account.plan, account.remote_id, account.attempts = plan, None, 0
    account.state = AccountState.CREATING


def is_leased(account: RemoteAccount) -> bool:
    return bool(account.lease) and account.lease_until > _now_us()


def _leased(
    account: RemoteAccount, subject: Subject, context: Context, *, in_doubt: bool = False
) -> Call:
    account.lease = uuid4().hex
    account.lease_until = _now_us() + remotes_of(context).lease_us
    return Call(
        subject=subject,
        lease=account.lease,
        generation=account.generation,
        plan=account.plan,
        remote_id=account.remote_id,
        attempts=account.attempts,
        in_doubt=in_doubt,
    )


@asynccontextmanager
async def limited(context: Context) -> AsyncGenerator[None]:
    """Ends a call in time for its lease; raises Unavailable then."""
    try:
        with anyio.fail_after(remotes_of(context).timeout_s):
            yield
    except TimeoutError as error:
        raise Unavailable(f"no answer within {remotes_of(context).timeout_s:g} s") from error


async def ended(session: AsyncSession, call: Call) -> tuple[RemoteAccount, Requirement]:
    """The rows of a call that has ended, locked, and its lease given back. Raises Lost."""
    subject = call.subject
    account = await locked_account(session, subject.user_ref, subject.system)
    need = await requirement_of(session, subject.order_ref, subject.system)
    if account.lease != call.lease or need is None:
        raise Lost(f"the call about {call.key} took longer than its lease")
    account.lease, account.lease_until = "", 0
    return account, need


async def note_failure(
    call: Call, context: Context, error: str, *, event: Event | None = None
) -> None:
    """Put on record that an attempt failed, and that it may have been carried out."""
    async with own_transaction(context) as session:
        account, _ = await ended(session, call)
        account.attempts += 1
        account.error = error[:500]
        if event is not None:
            account.record(event)


@asynccontextmanager
async def own_transaction(context: Context) -> AsyncGenerator[AsyncSession]:
    """A short transaction beside the one of the message."""
    engine = context.session.bind
    assert isinstance(engine, AsyncEngine)
    async with SagaSession(engine, expire_on_commit=False) as session, session.begin():
        yield session


def _now_us() -> int:
    return time.time_ns() // 1000
