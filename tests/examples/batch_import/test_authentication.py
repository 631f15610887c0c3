"""The authentication service alone: nobody who orders, nobody who makes accounts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from examples.batch_import.authentication.tokens import (
    cycle_id,
    message_id_of,
    token_hash,
    token_of,
)
from examples.batch_import.cli import main as command_line
from examples.batch_import.messages import (
    ConfirmationRefused,
    ConfirmEmail,
    EmailConfirmed,
    OptInPending,
    OptInRequested,
    RequestOptIn,
    UserEmailChanged,
)
from examples.batch_import.program import Program
from tests.examples.batch_import.scene import QUIET_WITHIN_S, emitted, publish

PROGRAM_SERVICES = ("authentication",)
PROGRAM_SETTINGS = {"BATCH_IMPORT_MAIL_BACKOFF_MS": "20"}
_numbers = itertools.count(1)


@pytest.fixture
def user() -> str:
    return f"user-{next(_numbers)}"


def address(user: str, domain: str = "example.test") -> str:
    return f"{user}@{domain}"


def cycles(program: Program, user: str) -> list[dict[str, Any]]:
    rows = program.rows("authentication", "optin", user_ref=user)
    return sorted(rows, key=lambda row: int(row["cycle"]))


def test_tokens_and_message_ids_are_derived() -> None:
    assert token_of("s", "u", 1, "a@b") == token_of("s", "u", 1, "a@b")
    assert (
        token_of("s", "u", 1, "a@b")
        == "e557ab134785a27aa5a8bffeda4ed233f1f412a98ad9614f63b1abb62dffe84a"
    )
    others = {
        token_of("other", "u", 1, "a@b"),
        token_of("s", "v", 1, "a@b"),
        token_of("s", "u", 2, "a@b"),
        token_of("s", "u", 1, "b@b"),
    }
    assert len(others | {token_of("s", "u", 1, "a@b")}) == 5
    assert cycle_id("u", 12) != cycle_id("u1", 2)
    assert message_id_of("u", 1).startswith(f"<{cycle_id('u', 1)}@")


@pytest.mark.requirement("R15")
def test_one_cycle_for_all_who_ask(program: Program, user: str) -> None:
    """It boots, mails and confirms without the two other services, of which it knows nothing."""
    publish(program, *[RequestOptIn(user, address(user))] * 3)
    (cycle,) = cycles(program, user)
    assert cycle["state"] == "mailed"
    (mail,) = program.mails(address(user))
    token = program.link(address(user)).rpartition("/")[2]
    assert cycle["token_hash"] == token_hash(token)
    assert token not in str(cycle)
    assert mail["message_id"] == cycle["message_id"]
    assert len(emitted(program, "authentication", OptInRequested, user_ref=user)) == 1
    assert len(emitted(program, "authentication", OptInPending, user_ref=user)) == 3

    assert program.follow(program.link(address(user))).status_code == 202
    program.wait_until_quiet(QUIET_WITHIN_S)
    publish(program, RequestOptIn(user, address(user)))
    said = emitted(program, "authentication", EmailConfirmed, user_ref=user)
    assert [(event.email, event.cycle) for event in said] == [(address(user), 1)] * 2
    assert len(program.mails(address(user))) == 1


@pytest.mark.requirement("R60")
def test_a_confirmation_is_the_same_from_wherever_it_comes(
    program: Program, tmp_path: Path
) -> None:
    """From the page, from the command line, and as a message of another service."""
    users = {way: f"{way}-{next(_numbers)}" for way in ("page", "command-line", "message")}
    publish(program, *(RequestOptIn(user, address(user)) for user in users.values()))
    links = {way: program.link(address(user)) for way, user in users.items()}

    assert program.follow(links["page"]).status_code == 202
    program.place.write(tmp_path)
    token = links["command-line"].rpartition("/")[2]
    given = CliRunner().invoke(command_line, ["confirm", token, "--at", str(tmp_path)])
    assert given.exit_code == 0, given.output
    publish(program, ConfirmEmail(links["message"].rpartition("/")[2]))

    for user in users.values():
        (cycle,) = cycles(program, user)
        assert cycle["state"] == "confirmed"
        (said,) = emitted(program, "authentication", EmailConfirmed, user_ref=user)
        assert said == EmailConfirmed(user, address(user), 0, 1)


@pytest.mark.parametrize("token", ["wrong", "x" * 100, "ä"])
def test_a_wrong_token_changes_nothing(program: Program, user: str, token: str) -> None:
    publish(program, RequestOptIn(user, address(user)))
    before = program.rows("authentication", "optin")
    refused = len(emitted(program, "authentication", ConfirmationRefused))
    assert program.visit(f"{program.confirm_url}/{token}").status_code == 404
    assert program.follow(f"{program.confirm_url}/{token}").status_code == 202
    program.wait_until_quiet(QUIET_WITHIN_S)
    assert program.rows("authentication", "optin") == before
    assert len(emitted(program, "authentication", ConfirmationRefused)) == refused + 1
    assert program.held_up() == []


def test_a_token_of_any_length_is_not_stored(program: Program) -> None:
    assert program.follow(f"{program.confirm_url}/{'x' * 101}").status_code == 404


def test_the_page_gives_nothing_away(program: Program, user: str) -> None:
    publish(program, RequestOptIn(user, address(user)))
    page = program.visit(program.link(address(user)))
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert address(user) not in page.text
    (cycle,) = cycles(program, user)
    assert cycle["state"] == "mailed"


def test_an_older_address_does_not_replace_a_newer_one(program: Program, user: str) -> None:
    """An order of the old address is slower than the change of it."""
    old, new = address(user, "old.test"), address(user, "new.test")
    publish(program, UserEmailChanged(user, new, version=2))
    publish(program, RequestOptIn(user, old, version=1))
    (cycle,) = cycles(program, user)
    assert cycle["email"] == new
    assert program.mails(old) == []
    assert len(program.mails(new)) == 1

    publish(program, UserEmailChanged(user, old, version=1))
    assert len(cycles(program, user)) == 1


def test_a_changed_address_is_asked_for_only_where_the_old_one_was(
    program: Program, user: str
) -> None:
    publish(program, UserEmailChanged(user, address(user, "one.test"), version=2))
    assert cycles(program, user) == []
    publish(program, RequestOptIn(user, address(user, "one.test"), version=2))
    program.follow(program.link(address(user, "one.test")))
    program.wait_until_quiet(QUIET_WITHIN_S)

    publish(program, UserEmailChanged(user, address(user, "two.test"), version=3))
    assert program.mails(address(user, "two.test")) == [], "nobody needs it yet"
    publish(program, RequestOptIn(user, address(user, "two.test"), version=3))
    assert [row["state"] for row in cycles(program, user)] == ["confirmed", "mailed"]
    assert len(program.mails(address(user, "two.test"))) == 1


def test_an_order_that_knows_the_new_address_first(program: Program, user: str) -> None:
    """RequestOptIn with the new address is faster than the change itself: still one new cycle."""
    publish(program, RequestOptIn(user, address(user, "one.test"), version=1))
    publish(program, RequestOptIn(user, address(user, "two.test"), version=2))
    publish(program, UserEmailChanged(user, address(user, "two.test"), version=2))
    assert [row["state"] for row in cycles(program, user)] == ["superseded", "mailed"]
    assert len(program.mails(address(user, "two.test"))) == 1
