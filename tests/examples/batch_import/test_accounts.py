"""The accounts service alone: nobody who imports, nobody who asks for confirmation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from examples.batch_import.messages import (
    AccountsNeeded,
    EmailConfirmed,
    OptInExpired,
    OptInMailRefused,
    OrderAccountsFailed,
    OrderAccountsReady,
    OrderCancelled,
    RequestOptIn,
)
from examples.batch_import.program import Program
from tests.examples.batch_import.scene import QUIET_WITHIN_S, emitted, publish, sagas, send
from tests.waiting import eventually

PROGRAM_SERVICES = ("accounts",)
ALL = ["billing", "shipping", "loyalty"]
_numbers = itertools.count(1)


@pytest.fixture
def name(program: Program) -> Iterator[str]:
    yield f"n{next(_numbers)}"
    for system in ALL:
        program.set_faults(system)


def needed(order: str, user: str, *systems: str, version: int = 1) -> AccountsNeeded:
    return AccountsNeeded(
        order, user, f"{user}@example.test", list(systems), ["" for _ in systems], version
    )


def confirmed(user: str, version: int = 1) -> EmailConfirmed:
    return EmailConfirmed(user, f"{user}@example.test", version, 1)


def state(program: Program, order: str) -> str:
    found = sagas(program, "accounts", "AccountSaga", order)
    return "" if found is None else found["state"]


def entries(program: Program, system: str, user: str) -> list[str]:
    return [row["operation"] for row in program.ledger(system) if row["external_ref"] == user]


@pytest.mark.requirement("R15")
def test_it_needs_nothing_but_two_facts(program: Program, name: str) -> None:
    publish(program, needed(name, name, *ALL))
    assert state(program, name) == "requesting"
    assert len(emitted(program, "accounts", RequestOptIn, user_ref=name)) == 1
    publish(program, confirmed(name))
    assert state(program, name) == "ready"
    for system in ALL:
        assert entries(program, system, name) == ["create"]
    assert len(emitted(program, "accounts", OrderAccountsReady, order_ref=name)) == 1


@pytest.mark.requirement("R12")
def test_one_requirement_for_each_system_that_is_named(program: Program, name: str) -> None:
    for count in (0, 1, 3):
        order = f"{name}-{count}"
        publish(program, needed(order, name, *ALL[:count]))
        rows = program.rows("accounts", "requirement", order_ref=order)
        assert sorted(row["system"] for row in rows) == sorted(ALL[:count])
        assert {row["state"] for row in rows} <= {"required"}


def test_orders_of_one_user_that_come_at_once_share_the_accounts(
    program: Program, name: str
) -> None:
    orders = [f"{name}-{number}" for number in range(8)]
    for system in ALL:
        program.set_faults(
            system, {"action": "unavailable", "on": "create", "match": {"user": name}, "times": 2}
        )
    publish(program, *(needed(order, name, *ALL) for order in orders))
    publish(program, confirmed(name))
    assert [state(program, order) for order in orders] == ["ready"] * 8
    for system in ALL:
        assert entries(program, system, name) == ["create"]

    publish(program, *(OrderCancelled(order) for order in orders[:7]))
    for system in ALL:
        assert entries(program, system, name) == ["create"]
    publish(program, OrderCancelled(orders[7]))
    for system in ALL:
        assert entries(program, system, name) == ["create", "delete"]
    assert [state(program, order) for order in orders] == ["cancelled"] * 8


def test_a_worker_killed_during_its_calls_makes_no_second_account(
    program: Program, name: str
) -> None:
    """The next one knows that calls may be under way, waits for their end, and asks again."""
    for system in ALL:
        program.set_faults(system, {"action": "hold", "on": "create", "match": {"user": name}})
    publish(program, needed(name, name, *ALL))
    send(program, confirmed(name))
    for system in ALL:
        until_held(program, system)
        assert entries(program, system, name) == ["create"]
    restarted_after_a_kill(program)
    eventually(lambda: state(program, name) == "ready", "the order")
    program.wait_until_quiet(QUIET_WITHIN_S)
    for system in ALL:
        assert entries(program, system, name) == ["create"]
    rows = program.rows("accounts", "remote_account", user_ref=name)
    assert {(row["state"], row["lease"]) for row in rows} == {("active", "")}


def test_a_worker_killed_during_its_deletes(program: Program, name: str) -> None:
    """One delete is under way at a time: undoing goes step by step."""
    publish(program, needed(name, name, *ALL))
    publish(program, confirmed(name))
    lost = {"action": "timeout", "on": "delete", "match": {"user": name}}
    program.set_faults("loyalty", lost)
    send(program, OrderCancelled(name))
    until_held(program, "loyalty")
    restarted_after_a_kill(program)
    eventually(lambda: state(program, name) == "cancelled", "the order")
    program.wait_until_quiet(QUIET_WITHIN_S)
    for system in ALL:
        assert entries(program, system, name) == ["create", "delete"]
    rows = program.rows("accounts", "remote_account", user_ref=name)
    assert {(row["state"], row["remote_id"]) for row in rows} == {("absent", None)}


def until_held(program: Program, system: str) -> None:
    eventually(
        lambda: any(rule["waiting"] for rule in program.faults(system)), f"a request at {system}"
    )


def restarted_after_a_kill(program: Program) -> None:
    program.kill("accounts")
    for system in ALL:
        program.set_faults(system)
    program.restart("accounts")


def test_the_plan_of_the_first_order_counts(program: Program, name: str) -> None:
    """A second order with another plan shares the account, also while the first is in doubt."""
    program.set_faults(
        "shipping", {"action": "drop-reply", "on": "create", "match": {"user": name}, "times": 3}
    )
    one = AccountsNeeded(f"{name}-1", name, "a@b.test", ["shipping"], ["basic"], 1)
    two = AccountsNeeded(f"{name}-2", name, "a@b.test", ["shipping"], ["plus"], 1)
    publish(program, one, two)
    publish(program, confirmed(name))
    assert [state(program, f"{name}-{number}") for number in (1, 2)] == ["ready", "ready"]
    assert entries(program, "shipping", name) == ["create"]


def test_an_order_that_is_cancelled_before_anything(program: Program, name: str) -> None:
    publish(program, OrderCancelled(name))
    publish(program, needed(name, name, "billing"))
    publish(program, confirmed(name))
    assert state(program, name) == "cancelled"
    assert program.rows("accounts", "requirement", order_ref=name) == []
    assert entries(program, "billing", name) == []
    (told,) = emitted(program, "accounts", OrderAccountsFailed, order_ref=name)
    assert told.outcome == "cancelled"


def test_an_order_that_is_cancelled_while_it_waits(program: Program, name: str) -> None:
    publish(program, needed(name, name, "billing"))
    publish(program, OrderCancelled(name))
    publish(program, confirmed(name))
    assert state(program, name) == "cancelled"
    assert entries(program, "billing", name) == []
    (row,) = program.rows("accounts", "requirement", order_ref=name)
    assert row["state"] == "released"


def test_a_confirmation_of_an_older_address_is_none(program: Program, name: str) -> None:
    publish(program, needed(name, name, "billing", version=3))
    publish(program, confirmed(name, version=2))
    assert state(program, name) == "requesting"
    publish(program, confirmed(name, version=3))
    assert state(program, name) == "ready"


@pytest.mark.parametrize(
    "end", [OptInExpired("{}", 1), OptInMailRefused("{}", 1, "550 no such mailbox")]
)
def test_the_end_of_an_earlier_cycle_is_no_answer(
    program: Program, name: str, end: OptInExpired | OptInMailRefused
) -> None:
    """It comes before the answer to the question that the order has asked."""
    publish(program, needed(name, name, "billing"))
    told = (
        OptInExpired(name, 1)
        if isinstance(end, OptInExpired)
        else OptInMailRefused(name, 1, end.reason)
    )
    publish(program, told)
    assert state(program, name) == "requesting"
    publish(program, confirmed(name))
    assert state(program, name) == "ready"


def test_confirmations_of_users_without_orders_are_forgotten(program: Program, name: str) -> None:
    publish(program, confirmed(name), OptInExpired(name, 1))
    assert program.held_up() == []
