"""What the authentication service does when it is told something: cycles, mails, confirmations."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final, cast

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.batch_import import mail
from examples.batch_import.authentication.tables import (
    PENDING,
    KnownUser,
    OptIn,
    OptInState,
    cycle_of,
    locked_user,
    microseconds,
    moment_of,
)
from examples.batch_import.authentication.tokens import token_hash, token_of
from examples.batch_import.messages import (
    ConfirmationRefused,
    ConfirmEmail,
    EmailConfirmed,
    ExpireOptIn,
    OptInMailRefused,
    OptInMailSent,
    OptInPending,
    RemindOptIn,
    RequestOptIn,
    SendOptInMail,
    UserEmailChanged,
)
from examples.batch_import.surroundings import MailSurroundings
from sagacity import Context, Retry, handles, subscribes
from sagacity.backends.sql.session import SagaSession

log = logging.getLogger(__name__)

SENDER: Final = "accounts@batch-import.example"
SMTP_TIMEOUT_S: Final = 10.0
MAIL_RETRY: Final = Retry(
    attempts_max=100_000,  # a mail is given up by the end of its cycle, not by a number
    base_us=int(os.environ.get("BATCH_IMPORT_MAIL_BACKOFF_MS") or 500) * 1000,
    cap_us=30_000_000,
)


# ---------------------------------------------------------------------------------------- asking


@handles(RequestOptIn)
async def request_opt_in(
    command: RequestOptIn, context: Context
) -> EmailConfirmed | OptInMailRefused | OptInPending:
    """Answer for the present address of the user; begin a cycle where there is none for it."""
    session = context.session
    user = await locked_user(session, command.user_ref)
    if command.version > user.version:
        await _adopt(session, user, command.email, command.version, context)
    current = await cycle_of(session, user.user_ref, user.cycle)
    if current is not None and current.email == user.email:
        match OptInState(current.state):
            case OptInState.CONFIRMED:
                return EmailConfirmed(user.user_ref, user.email, user.version, user.cycle)
            case OptInState.UNDELIVERABLE:
                return OptInMailRefused(user.user_ref, user.cycle, current.reason)
            case _ if current.is_pending(context.now):
                return OptInPending(user.user_ref, user.cycle)
            case state if state in PENDING:
                current.expire()  # its timeout is about to come
            case _:
                pass
    _begin(session, user, context)
    return OptInPending(user.user_ref, user.cycle)


@subscribes(UserEmailChanged)
async def note_address(event: UserEmailChanged, context: Context) -> None:
    """A changed address makes the token for the old one void, and is asked for if that one was."""
    session = context.session
    user = await locked_user(session, event.user_ref)
    if event.version >= user.version:
        await _adopt(session, user, event.email, event.version, context)


async def _adopt(
    session: AsyncSession, user: KnownUser, email: str, version: int, context: Context
) -> None:
    changed = user.email != email
    user.email, user.version = email, version
    if not changed:
        return
    current = await cycle_of(session, user.user_ref, user.cycle)
    if current is not None and current.state in PENDING:
        current.state = OptInState.SUPERSEDED
        _begin(session, user, context)


def _begin(session: AsyncSession, user: KnownUser, context: Context) -> None:
    around = cast("MailSurroundings", context.state)
    session.add(
        OptIn.begin(
            user,
            context.now,
            secret=around.secret,
            expires=around.expires,
            reminder=around.reminder,
        )
    )


# ---------------------------------------------------------------------------------------- mailing


@handles(SendOptInMail, retry=MAIL_RETRY, concurrency=8)
async def send_opt_in_mail(
    command: SendOptInMail, context: Context
) -> OptInMailSent | OptInMailRefused | None:
    """Send the mail of a cycle, unless the cycle is over.

    That the mail may leave is on record before it does: a confirmation that is faster than our
    own note of the mail finds a token to confirm.
    """
    optin = await _about_to_send(command, context)
    if optin is None:
        return None
    if optin.sent_at is not None:
        return OptInMailSent(command.user_ref, command.cycle)
    try:
        await _send(optin, context)  # MailUnavailable: tried again
    except mail.MailRefused as error:
        return await _give_up(command, context, error.reason)
    await locked_user(context.session, command.user_ref)
    optin = await cycle_of(context.session, command.user_ref, command.cycle)
    assert optin is not None
    optin.sent_at = microseconds(context.now)
    if optin.state == OptInState.SENDING:  # it may be confirmed already
        optin.state = OptInState.MAILED
    return OptInMailSent(command.user_ref, command.cycle)


async def _about_to_send(command: SendOptInMail, context: Context) -> OptIn | None:
    async with own_transaction(context) as session:
        await locked_user(session, command.user_ref)
        optin = await cycle_of(session, command.user_ref, command.cycle)
        if optin is None or not optin.is_pending(context.now):
            return None
        if optin.state == OptInState.REQUESTED:
            optin.state = OptInState.SENDING
        return optin


async def _give_up(
    command: SendOptInMail, context: Context, reason: str
) -> OptInMailRefused | None:
    await locked_user(context.session, command.user_ref)
    optin = await cycle_of(context.session, command.user_ref, command.cycle)
    assert optin is not None
    if optin.state not in PENDING:
        return None
    optin.state = OptInState.UNDELIVERABLE
    optin.reason = reason[:500]
    return OptInMailRefused(command.user_ref, command.cycle, optin.reason)


@handles(RemindOptIn, retry=MAIL_RETRY, concurrency=8)
async def remind_opt_in(command: RemindOptIn, context: Context) -> None:
    """Send the same mail once more, while there is still something to confirm."""
    async with own_transaction(context) as session:
        optin = await cycle_of(session, command.user_ref, command.cycle)
    if optin is None or not optin.is_pending(context.now):
        return
    try:
        await _send(optin, context)
    except mail.MailRefused as error:
        # The first one was accepted, so its token stays good.
        log.warning(
            "Reminder was refused", extra={"user_ref": optin.user_ref, "reason": error.reason}
        )


async def _send(optin: OptIn, context: Context) -> None:
    around = cast("MailSurroundings", context.state)
    message = mail.compose(
        to=optin.email,
        name="",
        token=token_of(around.secret, optin.user_ref, optin.cycle, optin.email),
        message_id=optin.message_id,
        confirm_url=around.confirm_url,
        sender=SENDER,
        date=moment_of(optin.requested_at),
    )
    await mail.send(message, host=around.smtp_host, port=around.smtp_port, timeout=SMTP_TIMEOUT_S)


# ------------------------------------------------------------------------- confirming and expiring


@handles(ConfirmEmail)
async def confirm_email(command: ConfirmEmail, context: Context) -> ConfirmationRefused | None:
    """Confirm by a token; the second time changes nothing, and neither does a token that is no good."""
    session = context.session
    wanted = select(OptIn.user_ref, OptIn.cycle).where(
        OptIn.token_hash == token_hash(command.token)
    )
    found = (await session.execute(wanted)).one_or_none()
    if found is None:
        return ConfirmationRefused("no such token")
    user = await locked_user(session, found.user_ref)
    optin = await cycle_of(session, found.user_ref, found.cycle)
    assert optin is not None
    if optin.state == OptInState.CONFIRMED:
        return None
    if not optin.is_pending(context.now):
        return ConfirmationRefused(_why_not(optin), optin.user_ref)
    optin.confirm(user, context.now)
    return None


def _why_not(optin: OptIn) -> str:
    if optin.state == OptInState.SUPERSEDED:
        return "the address has changed since"
    if optin.state == OptInState.UNDELIVERABLE:
        return "the mail was refused"
    return "the time to confirm is over"


@handles(ExpireOptIn)
async def expire_opt_in(
    command: ExpireOptIn, context: Context
) -> EmailConfirmed | OptInMailRefused | None:
    """End a cycle that nobody has confirmed; answer with its end if it had another one."""
    session = context.session
    user = await locked_user(session, command.user_ref)
    optin = await cycle_of(session, command.user_ref, command.cycle)
    if optin is None:
        return None
    if optin.state in PENDING:
        optin.expire()
    elif optin.state == OptInState.CONFIRMED:
        return EmailConfirmed(user.user_ref, optin.email, user.version, optin.cycle)
    elif optin.state == OptInState.UNDELIVERABLE:
        return OptInMailRefused(user.user_ref, optin.cycle, optin.reason)
    return None


# -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def own_transaction(context: Context) -> AsyncGenerator[AsyncSession]:
    """A short transaction before the one of the message: what must be on record before a call."""
    engine = context.session.bind
    assert isinstance(engine, AsyncEngine)
    async with SagaSession(engine, expire_on_commit=False) as session, session.begin():
        yield session


HANDLERS: Final = (
    request_opt_in,
    note_address,
    send_opt_in_mail,
    remind_opt_in,
    confirm_email,
    expire_opt_in,
)
