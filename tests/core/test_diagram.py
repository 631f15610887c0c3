"""Sagas as pictures."""

from __future__ import annotations

from datetime import timedelta

from sagacity.core.diagram import mermaid
from sagacity.core.saga import Saga, State, on, on_timeout
from tests.core.driver import definition_of
from tests.core.sagas import AccountGeneration, Opened, Trip

ACCOUNTS = """\
stateDiagram-v2
    direction LR
    state "waiting" as s_waiting
    state "creating" as s_creating
    state "ready" as s_ready
    state "refused" as s_refused
    [*] --> s_waiting : AccountsNeeded
    s_waiting --> s_creating : EmailConfirmed
    s_waiting --> s_refused : timeout: opt-in
    s_creating --> s_creating : AccountCreated
    s_creating --> s_ready : AccountCreated
    s_creating --> s_refused : failed: CreateAccount
    s_ready --> [*]
    s_refused --> [*]
    note right of s_waiting
        may compensate on timeout: opt-in
    end note
    note right of s_creating
        may compensate on failed: CreateAccount
    end note
"""


def test_a_saga_is_drawn_as_it_is_declared() -> None:
    """Start, states, ends, messages, failures, timeouts and compensation."""
    assert mermaid(definition_of(AccountGeneration)) == ACCOUNTS


def test_numbers_stand_in_the_states() -> None:
    drawn = mermaid(definition_of(AccountGeneration), {"waiting": 3, "ready": 0})
    assert drawn.splitlines()[2:6] == [
        '    state "waiting (3)" as s_waiting',
        '    state "creating" as s_creating',
        '    state "ready (0)" as s_ready',
        '    state "refused" as s_refused',
    ]


def test_answers_that_bring_nothing_are_marked_and_edges_share_a_line() -> None:
    drawn = mermaid(definition_of(Trip))
    assert "    s_booking --> s_booked : done: Book, done: Notify\n" in drawn
    assert "    s_booking --> s_booking : done: Book, done: Notify, TripChanged\n" in drawn
    assert "note" not in drawn


class Awkward(Saga, key="book"):
    """Names that mean something to Mermaid."""

    end = State()
    note = State(final=True)
    book: str

    @on(Opened, starts=True, goto=end)
    def begin(self) -> None:
        self.set_timeout('a "b": c;', after=timedelta(1))

    @on_timeout('a "b": c;', when=end, goto=note)
    def over(self) -> None: ...


def test_words_and_signs_of_mermaid_do_no_harm() -> None:
    assert mermaid(definition_of(Awkward)).splitlines()[4:6] == [
        "    [*] --> s_end : Opened",
        "    s_end --> s_note : timeout: a #34;b#34;#58; c#59;",
    ]
