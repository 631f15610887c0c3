"""Outcomes of the way to a confirmed address: mails, confirmations, changed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.batch_import.program import Program
from tests.examples.batch_import.scene import Scene, assert_green

PROGRAM_SETTINGS = {"BATCH_IMPORT_MAIL_BACKOFF_MS": "20"}


@pytest.fixture
def scene(program: Program, tmp_path: Path) -> Iterator[Scene]:
    yield Scene(program, tmp_path)
    program.set_faults("mail-sink")
    assert_green(program)


@pytest.mark.outcome("O1")
def test_confirmed_user_gets_all_accounts_and_no_mail(scene: Scene) -> None:
    scene.confirmed_user("ada")
    assert scene.accounts("ada") == {}
    mails = len(scene.mails("ada"))

    scene.load(orders=[scene.order("o", "ada", "billing", "shipping", "loyalty")])

    assert scene.order_state("o") == "ready"
    assert scene.accounts("ada") == {"billing": 1, "shipping": 1, "loyalty": 1}
    assert scene.holds("o") == {"billing": "active", "shipping": "active", "loyalty": "active"}
    assert len(scene.mails("ada")) == mails


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
    assert (scene.order_state("o1"), scene.order_state("o2")) == ("waiting", "waiting")

    scene.confirm("ada")

    assert (scene.order_state("o1"), scene.order_state("o2")) == ("ready", "ready")
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
