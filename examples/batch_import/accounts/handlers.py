"""What the accounts service does when it is told something: holds, remote accounts, the outcome."""

from typing import Final

from sqlalchemy import select, update

from examples.batch_import.accounts.calls import (
    RELEASE_RETRY,
    Call,
    Subject,
    claim_create,
    claim_release,
    ended,
    limited,
    next_generation,
    note_failure,
    own_transaction,
    remotes_of,
)
from examples.batch_import.accounts.tables import AccountState, Hold, Requirement
from examples.batch_import.accounts_api import PermanentRefusal, Unavailable
from examples.batch_import.messages import (
    BlockOrder,
    CreateBillingAccount,
    CreateLoyaltyAccount,
    CreateRemoteAccount,
    CreateShippingAccount,
    MarkOrderReady,
    OrderAccountsFailed,
    OrderAccountsReady,
    ReleaseBillingAccount,
    ReleaseLoyaltyAccount,
    ReleaseRemoteAccount,
    ReleaseShippingAccount,
    RemoteAccountCreated,
    RemoteAccountRefused,
    RemoteAccountReleased,
    RemoteReleaseFailed,
    RequireAccounts,
)
from sagacity import Command, Context, Refused, handles

SYSTEM_OF: Final[dict[type[Command], str]] = {
    CreateBillingAccount: "billing",
    ReleaseBillingAccount: "billing",
    CreateShippingAccount: "shipping",
    ReleaseShippingAccount: "shipping",
    CreateLoyaltyAccount: "loyalty",
    ReleaseLoyaltyAccount: "loyalty",
}


# ---------------------------------------------------------------------------------------- creating


@handles(CreateBillingAccount, CreateShippingAccount, CreateLoyaltyAccount)
async def create_account(command: CreateRemoteAccount, context: Context) -> RemoteAccountCreated:
    """Make sure that the account exists, with at most one create that has an effect.

    What is on record is enough to find out, after any crash and any lost answer: each attempt of one
    generation uses the same key and the same data.
    """
    subject = Subject(command.order_ref, command.user_ref, SYSTEM_OF[type(command)])
    claimed = await claim_create(subject, command.plan, context)
    if not isinstance(claimed, Call):
        return RemoteAccountCreated(
            subject.order_ref, subject.user_ref, subject.system, remote_id=claimed
        )
    try:
        async with limited(context):
            remote_id = await _made(claimed, command.plan, context)
    except PermanentRefusal as error:
        await _note_refusal(claimed, context, error.reason)
        raise Refused(error.reason) from error
    except Unavailable as error:
        await note_failure(claimed, context, error.reason)
        raise
    account, need = await ended(context.session, claimed)
    account.state, account.remote_id = AccountState.ACTIVE, remote_id
    account.attempts, account.error = 0, ""
    need.state = Hold.ACTIVE
    return RemoteAccountCreated(subject.order_ref, subject.user_ref, subject.system, remote_id)


async def _made(call: Call, plan: str, context: Context) -> str:
    subject = call.subject
    api = remotes_of(context).apis[subject.system]
    if call.in_doubt:
        present = await api.find(subject.user_ref)
        if present is not None:
            return present  # it survived, so this order keeps it
        call = await next_generation(call, plan, context)
    try:
        return await api.create(subject.user_ref, call.plan or None, call.key)
    except PermanentRefusal:
        if call.attempts:
            # An earlier attempt may have been carried out, and nobody would ever undo it.
            await api.delete(subject.user_ref, None)
        raise


async def _note_refusal(call: Call, context: Context, reason: str) -> None:
    subject = call.subject
    async with own_transaction(context) as session:
        account, need = await ended(session, call)
        account.state, account.attempts, account.error = AccountState.ABSENT, 0, reason[:500]
        need.state = Hold.REFUSED
        account.record(
            RemoteAccountRefused(subject.order_ref, subject.user_ref, subject.system, reason)
        )


# --------------------------------------------------------------------------------------- releasing


@handles(ReleaseBillingAccount, ReleaseShippingAccount, ReleaseLoyaltyAccount, retry=RELEASE_RETRY)
async def release_account(command: ReleaseRemoteAccount, context: Context) -> RemoteAccountReleased:
    """Drop the order's hold, and the account with the last hold on it."""
    subject = Subject(command.order_ref, command.user_ref, SYSTEM_OF[type(command)])
    call = await claim_release(subject, context)
    if call is None:
        return RemoteAccountReleased(
            subject.order_ref, subject.user_ref, subject.system, deleted=False
        )
    try:
        async with limited(context):
            api = remotes_of(context).apis[subject.system]
            await api.delete(subject.user_ref, call.remote_id)
    except PermanentRefusal as error:
        await _note_failed_release(call, context, error.reason, last=True)
        raise Refused(error.reason) from error
    except Unavailable as error:
        last = context.attempt >= RELEASE_RETRY.attempts_max
        await _note_failed_release(call, context, error.reason, last=last)
        raise
    account, need = await ended(context.session, call)
    account.state, account.remote_id = AccountState.ABSENT, None
    account.attempts, account.error = 0, ""
    need.state = Hold.RELEASED
    return RemoteAccountReleased(subject.order_ref, subject.user_ref, subject.system, deleted=True)


async def _note_failed_release(call: Call, context: Context, reason: str, *, last: bool) -> None:
    subject = call.subject
    told = RemoteReleaseFailed(subject.order_ref, subject.user_ref, subject.system, reason)
    await note_failure(call, context, reason, event=told if last else None)


# -------------------------------------------------------------------------------------- the order


@handles(RequireAccounts)
async def require_accounts(command: RequireAccounts, context: Context) -> None:
    """Write down what the order needs, before anything is done about it."""
    for system in command.systems:
        known = await context.session.get(Requirement, (command.order_ref, system))
        if known is None:
            context.session.add(
                Requirement(
                    order_ref=command.order_ref,
                    system=system,
                    user_ref=command.user_ref,
                    state=Hold.REQUIRED,
                )
            )


@handles(MarkOrderReady)
async def mark_order_ready(command: MarkOrderReady, context: Context) -> OrderAccountsReady:
    """Tell that the order has its accounts."""
    open_ones = select(Requirement.system).where(
        Requirement.order_ref == command.order_ref, Requirement.state != Hold.ACTIVE
    )
    missing = list(await context.session.scalars(open_ones))
    if missing:
        raise Refused(f"order {command.order_ref} lacks {', '.join(missing)}")
    return OrderAccountsReady(command.order_ref)


@handles(BlockOrder)
async def block_order(command: BlockOrder, context: Context) -> OrderAccountsFailed:
    """Tell that the order gets no accounts; what it has is released one by one."""
    await context.session.execute(
        update(Requirement)
        .where(Requirement.order_ref == command.order_ref, Requirement.state == Hold.REQUIRED)
        .values(state=Hold.RELEASED)
    )
    return OrderAccountsFailed(command.order_ref, command.outcome, command.reason)


HANDLERS: Final = (
    require_accounts,
    create_account,
    release_account,
    mark_order_ready,
    block_order,
)
