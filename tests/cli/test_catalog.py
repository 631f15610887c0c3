from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from sagacity import Command, Event, Saga, Service, State, handles, on, on_failure, subscribes
from sagacity.cli.catalog import Entry, catalog, listed, unhandled
from sagacity.cli.operator import main


class Asked(Event, topic="questions"):
    ref: str


class AskedLoudly(Asked):
    pass


class Answer(Command, topic="answers", version=2):
    ref: str


class Forget(Command, topic="answers"):
    ref: str


class Answered(Event, topic="answers"):
    ref: str


class Question(Saga, key="ref"):
    asked = State()
    closed = State(final=True)

    ref: str

    @on(Asked, starts=True, goto=asked)
    def begin(self, event: Asked) -> None:
        self.send(Answer(event.ref), undo=Forget(event.ref))

    @on(Answered, when=asked, goto=closed)
    def close(self, event: Answered) -> None:
        pass

    @on_failure(Answer, when=asked, goto=closed)
    def give_up(self) -> None:
        self.compensate("no answer")


@handles(Answer)
async def answer(command: Answer) -> Answered | None:
    return Answered(command.ref)


@handles(Forget)
async def forget(command: Forget) -> None:
    pass


@subscribes(Asked)
async def count(event: Asked) -> None:
    pass


@subscribes(Answered, mode="after_commit")
def log_it(event: Answered) -> None:
    pass


asking = Service("asking", sagas=[Question], handlers=[count, log_it])
answering = Service("answering", handlers=[answer, forget])


def by_name(*services: Service) -> dict[str, Entry]:
    return {entry.name: entry for entry in catalog(services)}


@pytest.mark.requirement("R61")
def test_every_maker_and_taker_of_a_message_is_listed() -> None:
    found = by_name(asking, answering)
    assert found["answers.Answer"].made_by == ["asking: Question.begin"]
    assert found["answers.Answer"].taken_by == [
        "answering: answer",
        "asking: Question.give_up (its failure)",
    ]
    assert found["answers.Forget"].made_by == ["asking: Question.begin (undo)"]
    assert found["answers.Answered"].made_by == ["answering: answer (reply)"]
    assert found["answers.Answered"].taken_by == [
        "asking: Question.close",
        "asking: log_it (after_commit)",
    ]
    assert found["questions.Asked"].made_by == []
    assert found["questions.Asked"].taken_by == ["asking: Question.begin", "asking: count"]
    assert found["questions.AskedLoudly"].taken_by == ["asking: count"]


def test_a_command_that_nobody_handles_stands_out() -> None:
    names = [entry.name for entry in unhandled(catalog([asking]))]
    assert names == ["answers.Answer", "answers.Forget"]
    assert unhandled(catalog([asking, answering])) == []
    lines = [click.unstyle(line) for line in listed(catalog([asking]))]
    start = lines.index("answers.Answer  command v2 on answers")
    assert lines[start + 1 : start + 4] == [
        "  from  asking: Question.begin",
        "  to    asking: Question.give_up (its failure)",
        "  nobody here handles it",
    ]


@pytest.mark.requirement("R61")
def test_the_catalog_prints_the_same_each_time_and_can_fail_a_build() -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["catalog", *arguments])
        return result.exit_code, result.output

    both = ("tests.cli.test_catalog:answering", "tests.cli.test_catalog:asking")
    assert run(*both) == run(*reversed(both))
    assert run("--check", *both)[0] == 0
    assert run("--check", "tests.cli.test_catalog:asking")[0] == 1
    entries = json.loads(run("--json", *both)[1])
    assert entries == sorted(entries, key=lambda entry: str(entry["name"]))
