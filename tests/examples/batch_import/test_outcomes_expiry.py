"""Outcomes of opt-in cycles that end by time. Fourteen days are six seconds here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.batch_import.messages import ConfirmationRefused, OptInExpired
from examples.batch_import.program import Program
from tests.examples.batch_import.scene import Scene, assert_green, emitted
from tests.waiting import eventually

PROGRAM_SETTINGS = {
    "BATCH_IMPORT_OPT_IN_EXPIRES_S": "6",
    "BATCH_IMPORT_OPT_IN_REMINDER_S": "0.5",
    "BATCH_IMPORT_MAIL_BACKOFF_MS": "20",
}


@pytest.fixture
def scene(program: Program, tmp_path: Path) -> Iterator[Scene]:
    yield Scene(program, tmp_path)
    program.set_faults("mail-sink")
    assert_green(program)


def test_the_reminder_is_the_same_mail_again(scene: Scene) -> None:
    scene.load(users=[scene.user("ada")], orders=[scene.order("o", "ada", "billing")])
    eventually(lambda: len(scene.mails("ada")) == 2, "the reminder")
    assert len({mail["raw"] for mail in scene.mails("ada")}) == 1


def test_a_gateway_that_never_comes_back_ends_with_the_cycle(scene: Scene) -> None:
    """The mail is tried until its cycle is over; then nobody tries any more."""
    scene.program.set_faults(
        "mail-sink", {"action": "temporary", "match": {"to": scene.email("ada")}}
    )
    scene.hand_in(users=[scene.user("ada")], orders=[scene.order("o", "ada", "billing")])
    eventually(
        lambda: (
            emitted(scene.program, "authentication", OptInExpired, user_ref=scene.ref("ada")) != []
        ),
        "the end of the cycle",
    )
    scene.settle()
    assert scene.order_state("o") == "failed"
    assert scene.mails("ada") == []
    assert scene.saga("OptInSaga", "ada") == {"status": "completed", "state": "expired"}


@pytest.mark.outcome("O8")
def test_a_token_that_has_expired_is_refused(scene: Scene) -> None:
    scene.load(
        users=[scene.user("ada")],
        orders=[scene.order("o1", "ada", "billing"), scene.order("o2", "ada", "loyalty")],
    )
    link = scene.program.link(scene.email("ada"))
    eventually(lambda: scene.order_states("o1", "o2") == ["failed", "failed"], "the expiry")
    assert scene.program.visit(link).status_code == 410

    scene.press(link)
    scene.settle()

    (cycle,) = scene.optins("ada")
    assert cycle["state"] == "expired"
    assert cycle["confirmed_at"] is None
    assert scene.order_states("o1", "o2") == ["failed", "failed"]
    assert scene.calls("ada") == []
    assert scene.saga("OptInSaga", "ada") == {"status": "completed", "state": "expired"}
    (refused,) = emitted(
        scene.program, "authentication", ConfirmationRefused, user_ref=scene.ref("ada")
    )
    assert refused.reason == "the time to confirm is over"

    # An order that comes later asks once more. This is the last test of the module.
    program = scene.program
    program.settings["BATCH_IMPORT_OPT_IN_EXPIRES_S"] = "600"
    program.stop_workers("authentication")
    program.restart("authentication")
    scene.load(orders=[scene.order("o3", "ada", "billing")])
    scene.confirm("ada")
    assert scene.order_states("o1", "o2", "o3") == ["failed", "failed", "ready"]
    assert [row["state"] for row in scene.optins("ada")] == ["expired", "confirmed"]
    assert scene.saga("OptInSaga", "ada") == {"status": "completed", "state": "confirmed"}
