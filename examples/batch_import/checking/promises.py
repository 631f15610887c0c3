"""I1 to I5: what users, orders and remote systems may rely on."""

from collections import defaultdict

from sqlalchemy import select

from examples.batch_import.checking.evidence import Found
from examples.batch_import.checking.invariant import invariant
from sagacity.backends.sql.tables import saga
from sagacity.core.instance import Status

HOLDING = ("creating", "active")
"""States of a requirement that keep an account alive."""
UNDER_WAY = ("creating", "deleting")
"""States of an account in which it is not known here whether it exists."""


@invariant(
    "I1",
    "no remote account is made before its user has confirmed an address",
    about=["authentication", "accounts"],
)
async def confirmed_first(found: Found) -> list[str]:
    optin = found.table("authentication", "optin")
    confirmed: dict[str, int] = {}
    for user_ref, at in await found.rows(
        "authentication",
        select(optin.c.user_ref, optin.c.confirmed_at).where(optin.c.confirmed_at.is_not(None)),
    ):
        confirmed[user_ref] = min(at, confirmed.get(user_ref, at))
    wrong: list[str] = []
    for system in found.evidence.ledgers:
        for entry in found.ledger(system):
            if entry.operation != "create":
                continue
            at = confirmed.get(entry.external_ref)
            if at is None:
                wrong.append(
                    f"{system} has an account of {entry.external_ref}, who never confirmed"
                )
            elif entry.at_us < at:
                early = (at - entry.at_us) / 1e6
                wrong.append(
                    f"{system} made an account of {entry.external_ref} {early:.3f} s too early"
                )
    return wrong


@invariant(
    "I2",
    "each opt-in cycle has one mail at most, and one if it says that it was mailed",
    about=["authentication"],
)
async def one_mail_a_cycle(found: Found) -> list[str]:
    optin = found.table("authentication", "optin")
    cycles = {
        row.message_id: row
        for row in await found.rows(
            "authentication",
            select(optin.c.message_id, optin.c.email, optin.c.sent_at, optin.c.user_ref),
        )
    }
    wrong: list[str] = []
    contents: defaultdict[str, set[bytes]] = defaultdict(set)
    for mail in found.mails():
        contents[mail.message_id].add(mail.raw)
        cycle = cycles.get(mail.message_id)
        if cycle is None:
            wrong.append(f"mail {mail.message_id} to {mail.to} belongs to no opt-in cycle")
        elif cycle.email != mail.to:
            wrong.append(f"mail {mail.message_id} went to {mail.to} instead of {cycle.email}")
    wrong += [
        f"mail {message_id} left with {len(distinct)} different contents"
        for message_id, distinct in contents.items()
        if len(distinct) > 1
    ]
    wrong += [
        f"the cycle of {row.user_ref} says that mail {message_id} was sent; nobody has received it"
        for message_id, row in cycles.items()
        if row.sent_at is not None and message_id not in contents
    ]
    return wrong


def live_accounts(found: Found, system: str) -> dict[str, list[str]]:
    """User -> ids of the accounts that exist, as the ledger tells it."""
    live: dict[str, dict[str, None]] = {}
    for entry in found.ledger(system):
        accounts = live.setdefault(entry.external_ref, {})
        if entry.operation == "create":
            accounts[entry.account] = None
        else:
            accounts.pop(entry.account, None)
    return {user: list(accounts) for user, accounts in live.items() if accounts}


@invariant(
    "I3",
    "a user has at most one live account in a system, the one that is on record",
    about=["accounts"],
)
async def one_account(found: Found) -> list[str]:
    account = found.table("accounts", "remote_account")
    local = {
        (row.system, row.user_ref): row for row in await found.rows("accounts", select(account))
    }
    wrong: list[str] = []
    for system in found.evidence.ledgers:
        live = live_accounts(found, system)
        for user, ids in live.items():
            row = local.get((system, user))
            if len(ids) > 1:
                wrong.append(f"{user} has {len(ids)} live accounts in {system}")
            elif row is None or (row.state not in UNDER_WAY and row.remote_id != ids[0]):
                known = "nothing" if row is None else row.remote_id
                wrong.append(f"{system} has account {ids[0]} of {user}; on record is {known}")
        wrong += [
            f"account {row.remote_id} of {user} is on record as active; {system} does not have it"
            for (of, user), row in local.items()
            if of == system and row.state == "active" and user not in live
        ]
    return wrong


@invariant(
    "I4",
    "a ready order has all its accounts, a failed or cancelled one holds none",
    about=["accounts", "importing"],
)
async def orders_hold_what_they_say(found: Found) -> list[str]:
    requirement = found.table("accounts", "requirement")
    needs: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in await found.rows("accounts", select(requirement)):
        needs[row.order_ref][row.system] = row.state
    unfinished = {
        key.decode(): status
        for key, status in await found.rows(
            "accounts",
            select(saga.c.saga_key, saga.c.status).where(
                saga.c.saga_type == "AccountSaga",
                saga.c.status.in_([Status.COMPENSATING.value, Status.STUCK.value]),
            ),
        )
    }
    order = found.table("importing", "order")
    wrong: list[str] = []
    for ref, systems, state in await found.rows(
        "importing",
        select(order.c.ref, order.c.systems, order.c.accounts_state).where(
            order.c.accounts_state != "none"
        ),
    ):
        needed = needs.pop(ref, {})
        active = {system for system, hold in needed.items() if hold == "active"}
        if state == "ready" and active != set(systems.split()):
            wrong.append(f"order {ref} is ready and needs {systems}; it has {sorted(active)}")
        elif state in {"failed", "cancelled"} and ref not in unfinished:
            held = sorted(system for system, hold in needed.items() if hold in HOLDING)
            if held:
                wrong.append(f"order {ref} is {state} and holds {', '.join(held)}")
        elif state == "waiting" and needed and active == set(systems.split()):
            wrong.append(f"order {ref} has all its accounts and still waits")
    # An order that was cancelled may be one that never asked importing for anything.
    wrong += [f"order {ref} has requirements and asked for none" for ref in needs]
    return wrong


@invariant("I5", "no remote account is left without an order that holds it", about=["accounts"])
async def nothing_is_left_over(found: Found) -> list[str]:
    requirement = found.table("accounts", "requirement")
    held = {
        (row.system, row.user_ref)
        for row in await found.rows(
            "accounts",
            select(requirement.c.system, requirement.c.user_ref)
            .where(requirement.c.state.in_(HOLDING))
            .distinct(),
        )
    }
    return [
        f"{system} has account {ids[0]} of {user}, which no order holds"
        for system in found.evidence.ledgers
        for user, ids in live_accounts(found, system).items()
        if (system, user) not in held
    ]
