"""Outcomes of making and releasing accounts while remote systems fail in all ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from examples.batch_import.messages import (
    OrderAccountsFailed,
    OrderAccountsReady,
    RemoteAccountReleased,
    RemoteReleaseFailed,
)
from examples.batch_import.program import Program
from sagacity.cli.operator import main as saga_command
from tests.examples.batch_import.scene import (
    Scene,
    assert_green,
    dead_letters,
    emitted,
    replace_data,
)
from tests.waiting import eventually

PROGRAM_SETTINGS = {
    "SAGACITY_ATTEMPTS_MAX": "30",
    "SAGACITY_BACKOFF_CAP_S": "0.1",
    "BATCH_IMPORT_REMOTE_TIMEOUT_S": "5",
    "BATCH_IMPORT_RELEASE_ATTEMPTS": "4",
    "BATCH_IMPORT_RELEASE_BACKOFF_MS": "20",
}
ALL = ("billing", "shipping", "loyalty")
REFUSE = {"action": "refuse", "on": "create"}
UNAVAILABLE = {"action": "unavailable", "on": "create"}
HOLD = {"action": "hold", "on": "create"}


@pytest.fixture(scope="module")
def confirmed(
    program: Program, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scene, Iterator[str]]:
    """A scene, and the names of its confirmed users: each test takes one."""
    scene = Scene(program, tmp_path_factory.mktemp("confirmed"))
    names = [f"u{number}" for number in range(20)]
    scene.confirmed_users(*names)
    return scene, iter(names)


@pytest.fixture
def scene(
    program: Program, confirmed: tuple[Scene, Iterator[str]], tmp_path: Path
) -> Iterator[Scene]:
    """A scene with the confirmed user ada."""
    scene = Scene(program, tmp_path)
    other, names = confirmed
    scene.adopt("ada", other, next(names))
    yield scene
    for system in ALL:
        program.set_faults(system)
    assert_green(program)


def operate(program: Program, *words: str) -> None:
    """What an operator types, in the database of accounts."""
    given = CliRunner().invoke(
        saga_command, [*words, "--yes", "--store", program.stores["accounts"]]
    )
    assert given.exit_code == 0, given.output


@pytest.mark.outcome("O11")
@pytest.mark.requirement("R25")
def test_a_refusal_releases_what_was_made(scene: Scene) -> None:
    scene.fault("shipping", "ada", UNAVAILABLE)
    scene.hand_in(orders=[scene.order("o", "ada", "billing", "shipping")])
    scene.until_made("billing", "ada")
    scene.fault("shipping", "ada", REFUSE)
    scene.settle()

    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.entries("shipping", "ada") == []
    assert scene.holds("o") == {"billing": "released", "shipping": "refused"}
    assert scene.saga("AccountSaga", "o") == {"status": "compensated", "state": "failed"}
    # Its parents' rows stay, and the failure is told.
    assert scene.order_state("o") == "failed"
    (told,) = emitted(scene.program, "accounts", OrderAccountsFailed, order_ref=scene.ref("o"))
    assert told.outcome == "failed"
    assert "422" in told.reason


@pytest.mark.outcome("O11")
def test_an_account_that_another_live_order_holds_stays(scene: Scene) -> None:
    scene.load(orders=[scene.order("live", "ada", "billing")])
    scene.fault("shipping", "ada", REFUSE)
    scene.load(orders=[scene.order("o", "ada", "billing", "shipping")])

    assert scene.order_states("live", "o") == ["ready", "failed"]
    assert scene.entries("billing", "ada") == ["create"]
    assert scene.holds("live") == {"billing": "active"}
    assert scene.holds("o") == {"billing": "released", "shipping": "refused"}

    scene.load(orders=[scene.order("live", "ada", "billing", status="cancelled")])
    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.order_state("live") == "cancelled"


@pytest.mark.outcome("O12")
def test_an_answer_that_comes_during_the_compensation_is_undone_too(scene: Scene) -> None:
    scene.fault("shipping", "ada", UNAVAILABLE)
    scene.fault("loyalty", "ada", HOLD)
    scene.hand_in(orders=[scene.order("o", "ada", *ALL)])
    scene.until_made("billing", "ada")
    scene.until_held("loyalty")
    scene.fault("shipping", "ada", REFUSE)
    scene.until_status("AccountSaga", "o", "compensating")
    assert scene.entries("loyalty", "ada") == ["create"]
    scene.program.set_faults("loyalty")  # and now it answers
    scene.settle()

    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.entries("loyalty", "ada") == ["create", "delete"]
    assert scene.entries("shipping", "ada") == []
    assert scene.saga("AccountSaga", "o") == {"status": "compensated", "state": "failed"}
    released = emitted(scene.program, "accounts", RemoteAccountReleased, order_ref=scene.ref("o"))
    assert [event.system for event in released] == ["loyalty", "billing"]


@pytest.mark.outcome("O13")
def test_a_system_that_is_away_for_a_while(scene: Scene) -> None:
    scene.fault("shipping", "ada", {**UNAVAILABLE, "times": 3})
    scene.load(orders=[scene.order("o", "ada", "billing", "shipping")])
    statuses = [status for system, _, status in scene.calls("ada") if system == "shipping"]
    assert statuses == [503, 503, 503, 201]
    assert scene.order_state("o") == "ready"
    assert scene.accounts("ada") == {"billing": 1, "shipping": 1}


@pytest.mark.requirement("R25")
def test_a_system_that_is_away_for_good(scene: Scene) -> None:
    """The attempts run out: the order fails, a dead letter says why, and nothing is held."""
    scene.fault("shipping", "ada", UNAVAILABLE)
    scene.load(orders=[scene.order("o", "ada", "billing", "shipping")])
    assert scene.order_state("o") == "failed"
    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.accounts("ada") == {}
    (letter,) = (
        one
        for one in dead_letters(scene.program, "accounts")
        if scene.ref("o").encode() in one["entry"]
    )
    assert letter["attempts"] == 30
    assert b"503" in letter["error"]
    (order,) = scene.program.rows("importing", "order", ref=scene.ref("o"))
    assert order["status"] == "new"


@pytest.mark.outcome("O14")
def test_an_answer_that_is_lost_makes_no_second_account(scene: Scene) -> None:
    for system in ALL:
        scene.fault(system, "ada", {"action": "drop-reply", "on": "create", "times": 2})
    scene.load(orders=[scene.order("o", "ada", *ALL, plan="plus")])
    assert scene.order_state("o") == "ready"
    for system in ALL:
        assert scene.entries(system, "ada") == ["create"]
        (rule,) = scene.program.faults(system)
        assert rule["used"] == (1 if system == "loyalty" else 2), "loyalty finds what it lost"


def test_a_refusal_after_a_lost_answer_leaves_no_account_behind(scene: Scene) -> None:
    """The system carried the first attempt out, lost its answer, and refuses the second."""
    scene.fault("billing", "ada", {"action": "drop-reply", "on": "create", "times": 1}, REFUSE)
    scene.load(orders=[scene.order("o", "ada", "billing")])
    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.order_state("o") == "failed"

    scene.program.set_faults("billing")
    scene.load(orders=[scene.order("again", "ada", "billing")])
    assert scene.entries("billing", "ada") == ["create", "delete", "create"]
    assert scene.order_state("again") == "ready"


@pytest.mark.outcome("O15")
def test_a_release_that_fails_for_a_while(scene: Scene) -> None:
    scene.fault("billing", "ada", {"action": "unavailable", "on": "delete", "times": 3})
    scene.load(orders=[scene.order("o", "ada", "billing")])
    scene.load(orders=[scene.order("o", "ada", "billing", status="cancelled")])
    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.saga("AccountSaga", "o") == {"status": "compensated", "state": "cancelled"}
    assert scene.order_state("o") == "cancelled"


@pytest.mark.outcome("O15")
@pytest.mark.parametrize("action", ["unavailable", "refuse"])
def test_a_release_that_fails_for_good_is_seen_and_can_be_retried(
    scene: Scene, action: str
) -> None:
    program = scene.program
    scene.load(orders=[scene.order("o", "ada", "loyalty", "billing")])
    scene.fault("billing", "ada", {"action": action, "on": "delete"})
    scene.load(orders=[scene.order("o", "ada", "loyalty", "billing", status="cancelled")])

    assert scene.saga("AccountSaga", "o") == {"status": "stuck", "state": "cancelled"}
    told = emitted(program, "accounts", RemoteReleaseFailed, order_ref=scene.ref("o"))
    assert [event.system for event in told] == ["billing"]
    assert scene.entries("loyalty", "ada") == ["create"], "older ones wait for newer ones"
    listed = [line for line in program.held_up() if scene.ref("o") in line]
    assert [line for line in listed if "is stuck in compensation" in line], listed
    assert_green(program)

    program.set_faults("billing")
    operate(program, "retry", "AccountSaga", scene.ref("o"))
    scene.until_status("AccountSaga", "o", "compensated")
    scene.settle()
    assert scene.accounts("ada") == {}
    assert scene.entries("billing", "ada") == ["create", "delete"]


def test_a_new_order_keeps_an_account_that_is_about_to_go(scene: Scene) -> None:
    """Never neither: it finds the account that could not be deleted, and holds it."""
    scene.load(orders=[scene.order("old", "ada", "billing")])
    scene.fault("billing", "ada", {"action": "unavailable", "on": "delete"})
    scene.load(orders=[scene.order("old", "ada", "billing", status="cancelled")])
    scene.until_status("AccountSaga", "old", "stuck")
    scene.load(orders=[scene.order("new", "ada", "billing")])
    assert scene.order_state("new") == "ready"
    assert scene.entries("billing", "ada") == ["create"]

    operate(scene.program, "retry", "AccountSaga", scene.ref("old"))
    scene.until_status("AccountSaga", "old", "compensated")
    scene.settle()
    assert scene.entries("billing", "ada") == ["create"]
    assert scene.holds("old") == {"billing": "released"}
    assert scene.holds("new") == {"billing": "active"}


def test_a_deleted_account_can_be_made_again(scene: Scene) -> None:
    for order in ("first", "second"):
        scene.load(orders=[scene.order(order, "ada", *ALL)])
        scene.load(orders=[scene.order(order, "ada", *ALL, status="cancelled")])
    for system in ALL:
        assert scene.entries(system, "ada") == ["create", "delete"] * 2


@pytest.mark.outcome("O16")
def test_an_order_that_is_cancelled_while_its_accounts_are_made(scene: Scene) -> None:
    scene.load(orders=[scene.order("live", "ada", "shipping")])
    scene.fault("loyalty", "ada", HOLD)
    scene.hand_in(orders=[scene.order("o", "ada", *ALL)])
    scene.until_made("billing", "ada")
    scene.until_held("loyalty")
    scene.hand_in(orders=[scene.order("o", "ada", *ALL, status="cancelled")])
    scene.until_status("AccountSaga", "o", "compensating")
    scene.program.set_faults("loyalty")
    scene.settle()

    assert scene.saga("AccountSaga", "o") == {"status": "compensated", "state": "cancelled"}
    assert scene.order_states("o", "live") == ["cancelled", "ready"]
    assert scene.accounts("ada") == {"shipping": 1}
    assert scene.entries("shipping", "ada") == ["create"]
    assert scene.entries("billing", "ada") == ["create", "delete"]
    assert scene.entries("loyalty", "ada") == ["create", "delete"]


@pytest.mark.requirement("R10")
def test_loading_is_acknowledged_at_once_and_the_outcome_is_told_once(scene: Scene) -> None:
    scene.fault("billing", "ada", HOLD)
    scene.hand_in(orders=[scene.order("o", "ada", "billing")])  # returns, though billing hangs
    scene.until_held("billing")
    assert scene.order_state("o") == "waiting"
    assert emitted(scene.program, "accounts", OrderAccountsReady, order_ref=scene.ref("o")) == []
    scene.program.set_faults("billing")
    scene.settle()
    assert scene.order_state("o") == "ready"
    told = emitted(scene.program, "accounts", OrderAccountsReady, order_ref=scene.ref("o"))
    assert len(told) == 1


@pytest.mark.outcome("O25")
def test_a_poison_event_stops_only_its_own_saga(scene: Scene) -> None:
    """One confirmation reaches three orders, and the stored data of one of them is spoilt."""
    program = scene.program
    names = ("o1", "poisoned", "o2")
    scene.load(
        users=[scene.user("bob")],
        orders=[scene.order(name, "bob", "billing", "loyalty") for name in names],
    )
    poisoned = scene.ref("poisoned")
    data = replace_data(program, "accounts", poisoned, b'{"order_ref": 7}')
    scene.confirm("bob")

    assert scene.order_states(*names) == ["ready", "waiting", "ready"]
    letters = [
        one for one in dead_letters(program, "accounts") if one["saga_key"] == poisoned.encode()
    ]
    (letter,) = letters
    assert letter["message_type"] == b"authentication.events.EmailConfirmed"
    assert any("EmailConfirmed" in line for line in program.held_up())
    assert scene.saga("AccountSaga", "poisoned") == {"status": "running", "state": "waiting"}

    replace_data(program, "accounts", poisoned, data)
    operate(program, "dead-letters", "replay", str(letter["id"]))
    eventually(lambda: scene.order_state("poisoned") == "ready", "the replay")
    scene.settle()
