"""Outcomes of the way to a confirmed address: mails, confirmations, changed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.batch_import.messages import (
    ConfirmationRefused,
    EmailConfirmed,
    OptInMailSent,
    OrderAccountsReady,
)
from examples.batch_import.program import Program
from tests.examples.batch_import.scene import Scene, assert_green, attempts, emitted
from tests.waiting import eventually

PROGRAM_SETTINGS = {"BATCH_IMPORT_MAIL_BACKOFF_MS": "20"}
ALL = ("billing", "shipping", "loyalty")


@pytest.fixture
def scene(program: Program, tmp_path: Path) -> Iterator[Scene]:
    yield Scene(program, tmp_path)
    program.set_faults("mail-sink")
    assert_green(program)


@pytest.mark.outcome("O1")
def test_confirmed_user_gets_all_accounts_and_no_mail(scene: Scene) -> None:
    scene.confirmed_users("ada")
    assert scene.calls("ada") == []
    mails = scene.mails("ada")

    scene.load(orders=[scene.order("o", "ada", *ALL)])

    assert scene.order_state("o") == "ready"
    assert scene.accounts("ada") == dict.fromkeys(ALL, 1)
    assert scene.holds("o") == dict.fromkeys(ALL, "active")
    assert scene.mails("ada") == mails


@pytest.mark.outcome("O2")
@pytest.mark.requirement("R13")
def test_unconfirmed_user_gets_one_mail_and_each_account_once_confirmed(scene: Scene) -> None:
    scene.load(
        users=[scene.user("ada")],
        orders=[
            scene.order("o1", "ada", "billing"),
            scene.order("o2", "ada", "billing", "loyalty"),
        ],
    )
    assert len(scene.mails("ada")) == 1
    assert scene.calls("ada") == []
    assert scene.order_states("o1", "o2") == ["waiting", "waiting"]

    scene.confirm("ada")

    assert scene.order_states("o1", "o2") == ["ready", "ready"]
    assert scene.entries("billing", "ada") == ["create"]
    assert scene.entries("loyalty", "ada") == ["create"]
    assert len(scene.mails("ada")) == 1
    assert scene.saga("OptInSaga", "ada") == {"status": "completed", "state": "confirmed"}


@pytest.mark.outcome("O3")
def test_order_that_names_no_system_leads_to_nothing(scene: Scene) -> None:
    scene.load(users=[scene.user("ada")], orders=[scene.order("o", "ada")])
    assert scene.mails("ada") == []
    assert scene.calls("ada") == []
    assert scene.holds("o") == {}
    assert scene.optins("ada") == []
    assert scene.order_state("o") == "none"


@pytest.mark.outcome("O6")
def test_confirming_twice_is_confirming_once(scene: Scene) -> None:
    scene.load(users=[scene.user("ada")], orders=[scene.order("o", "ada", "billing")])
    link = scene.program.link(scene.email("ada"))
    page = scene.program.visit(link)
    assert page.status_code == 200
    assert 'method="post"' in page.text
    assert scene.order_state("o") == "waiting", "looking at the page confirmed"

    scene.press(link)
    scene.press(link)
    scene.program.wait_until_quiet()
    scene.press(link)
    scene.program.wait_until_quiet()

    assert scene.order_state("o") == "ready"
    assert scene.entries("billing", "ada") == ["create"]
    said = emitted(scene.program, "authentication", EmailConfirmed, user_ref=scene.ref("ada"))
    assert len(said) == 1
    refused = emitted(
        scene.program, "authentication", ConfirmationRefused, user_ref=scene.ref("ada")
    )
    assert refused == []


@pytest.mark.outcome("O6")
def test_confirming_before_the_mail_is_known_to_be_sent(scene: Scene) -> None:
    """The gateway keeps each mail and loses its answer: who confirms knows more than we do."""
    dropping = {"action": "drop-reply", "match": {"to": scene.email("ada")}}
    scene.program.set_faults("mail-sink", dropping)
    scene.hand_in(users=[scene.user("ada")], orders=[scene.order("o", "ada", "billing")])
    eventually(lambda: len(scene.mails("ada")) > 0, "a mail")
    assert scene.optins("ada")[0]["state"] == "sending"
    assert scene.optins("ada")[0]["sent_at"] is None

    scene.confirm("ada")

    (cycle,) = scene.optins("ada")
    assert cycle["state"] == "confirmed"
    assert scene.order_state("o") == "ready"
    assert scene.saga("OptInSaga", "ada") == {"status": "completed", "state": "confirmed"}
    copies = scene.mails("ada")
    (rule,) = scene.program.faults("mail-sink")
    assert len(copies) <= 1 + rule["used"]
    assert {mail["message_id"] for mail in copies} == {cycle["message_id"]}
    assert len({mail["raw"] for mail in copies}) == 1


@pytest.mark.outcome("O7")
def test_changed_address_makes_the_old_token_void(scene: Scene) -> None:
    scene.load(users=[scene.user("ada")], orders=[scene.order("o", "ada", "billing")])
    old = scene.program.link(scene.email("ada"))
    scene.load(users=[scene.user("ada", email=scene.email("new"))])
    assert len(scene.mails("ada")) == 1
    assert len(scene.mails("new")) == 1

    scene.press(old)
    scene.program.wait_until_quiet()
    assert scene.program.visit(old).status_code == 410
    assert [row["state"] for row in scene.optins("ada")] == ["superseded", "mailed"]
    (refused,) = emitted(
        scene.program, "authentication", ConfirmationRefused, user_ref=scene.ref("ada")
    )
    assert refused.reason == "the address has changed since"
    assert scene.order_state("o") == "waiting"
    assert scene.calls("ada") == []

    scene.confirm("new")
    assert [row["state"] for row in scene.optins("ada")] == ["superseded", "confirmed"]
    assert scene.order_state("o") == "ready"
    assert scene.accounts("ada") == {"billing": 1}
    assert len(scene.mails("ada")) + len(scene.mails("new")) == 2


@pytest.mark.outcome("O9")
def test_mail_that_is_refused_for_good_blocks_the_orders(scene: Scene) -> None:
    scene.program.set_faults(
        "mail-sink", {"action": "permanent", "on": "rcpt", "match": {"to": scene.email("ada")}}
    )
    scene.load(
        users=[scene.user("ada")],
        orders=[scene.order("o1", "ada", "billing"), scene.order("o2", "ada", "loyalty")],
    )
    scene.load(orders=[scene.order("o3", "ada", "shipping")])

    assert scene.order_states("o1", "o2", "o3") == ["failed"] * 3
    (cycle,) = scene.optins("ada")
    assert cycle["state"] == "undeliverable"
    assert "550" in cycle["reason"]
    assert scene.saga("OptInSaga", "ada") == {"status": "completed", "state": "undeliverable"}
    (rule,) = scene.program.faults("mail-sink")
    assert rule["used"] == 1, "the gateway was asked again"
    assert scene.calls("ada") == []


@pytest.mark.outcome("O10")
@pytest.mark.requirement("R49")
def test_mail_that_is_refused_five_times_is_sent_once(scene: Scene) -> None:
    scene.program.set_faults(
        "mail-sink", {"action": "temporary", "match": {"to": scene.email("ada")}, "times": 5}
    )
    scene.load(users=[scene.user("ada")], orders=[scene.order("o", "ada", "billing")])
    (rule,) = scene.program.faults("mail-sink")
    assert rule["used"] == 5
    assert len(scene.mails("ada")) == 1
    sent = emitted(scene.program, "authentication", OptInMailSent, user_ref=scene.ref("ada"))
    assert len(sent) == 1

    scene.confirm("ada")
    assert scene.order_state("o") == "ready"


@pytest.mark.outcome("O10")
def test_mails_wait_for_a_gateway_that_is_down(scene: Scene) -> None:
    """Down for three attempts of each mail, which is a moment here; nothing counts the minutes."""
    program = scene.program
    program.kill_sink()
    scene.hand_in(
        users=[scene.user("ada"), scene.user("bob")],
        orders=[scene.order("o1", "ada", "billing"), scene.order("o2", "bob", "billing")],
    )
    eventually(lambda: attempts(program, "authentication") >= 3, "three attempts")
    assert scene.order_states("o1", "o2") == ["waiting", "waiting"]
    program.restart_sink()
    program.wait_until_quiet()
    assert [len(scene.mails(name)) for name in ("ada", "bob")] == [1, 1]

    scene.confirm("ada")
    scene.confirm("bob")
    assert scene.order_states("o1", "o2") == ["ready", "ready"]


@pytest.mark.requirement("R14")
def test_one_confirmation_releases_the_orders_of_all_batches(scene: Scene) -> None:
    scene.load(
        users=[scene.user("ada")],
        orders=[scene.order("o1", "ada", "billing"), scene.order("o2", "ada", "shipping")],
    )
    scene.load(orders=[scene.order("o3", "ada", "billing", "loyalty")])
    assert len(scene.mails("ada")) == 1

    scene.confirm("ada")

    assert scene.order_states("o1", "o2", "o3") == ["ready"] * 3
    assert scene.accounts("ada") == dict.fromkeys(ALL, 1)


@pytest.mark.outcome("O24")
@pytest.mark.parametrize("first", ["order", "confirmation"])
def test_facts_that_arrive_together_in_either_order(scene: Scene, first: str) -> None:
    """Both facts lie on the bus, in either order, before accounts hears of the first one."""
    program = scene.program
    scene.load(users=[scene.user("ada")], orders=[scene.order("o1", "ada", "billing")])
    link = program.link(scene.email("ada"))
    program.stop_workers("accounts")

    def load() -> None:
        batch = scene.hand_in(orders=[scene.order("o2", "ada", "billing", "loyalty")])
        eventually(lambda: scene.is_imported(batch), "the import")

    def confirm() -> None:
        scene.press(link)
        eventually(lambda: scene.optins("ada")[0]["state"] == "confirmed", "the confirmation")

    for fact in (load, confirm) if first == "order" else (confirm, load):
        fact()
    program.restart("accounts")
    program.wait_until_quiet()

    assert scene.order_states("o1", "o2") == ["ready", "ready"]
    assert scene.accounts("ada") == {"billing": 1, "loyalty": 1}
    assert scene.entries("billing", "ada") == ["create"]
    assert len(scene.mails("ada")) == 1
    for order in ("o1", "o2"):
        said = emitted(program, "accounts", OrderAccountsReady, order_ref=scene.ref(order))
        assert len(said) == 1


@pytest.mark.outcome("O24")
def test_confirmation_long_before_the_order(scene: Scene) -> None:
    scene.confirmed_users("ada")
    scene.load(orders=[scene.order("o", "ada", "billing", "loyalty")])
    assert scene.order_state("o") == "ready"
    assert scene.accounts("ada") == {"billing": 1, "loyalty": 1}
