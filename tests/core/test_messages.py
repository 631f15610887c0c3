"""Messages: immutable, named, versioned records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sagacity.codec import Registry
from sagacity.core.errors import DefinitionError, NotRecordable
from sagacity.core.messages import (
    Command,
    CommandDone,
    Event,
    Message,
    encode_message,
    message_type,
)
from tests.core.driver import envelope_of
from tests.core.sagas import AccountCreated, Noted

HERE = re.escape(__file__)


class Family(Event, topic="family", abstract=True, version=2):
    name: str


class Born(Family):
    at: datetime


class Renamed(Family, topic="elsewhere", name="family.Was", version=3):
    tags: set[str] = set()
    extra: Any = None


@pytest.mark.requirement("R1")
def test_assigning_a_field_raises() -> None:
    note = Noted("b", "x")
    with pytest.raises(AttributeError):
        note.text = "y"  # type: ignore[misc]
    assert note == Noted("b", "x")
    assert hash(note) == hash(Noted("b", "x"))


@pytest.mark.requirement("R28")
def test_a_message_cannot_reach_the_bus() -> None:
    public = {name for name in dir(Noted) if not name.startswith("_")}
    assert public == {"book", "text"}


def test_the_facts_of_a_class() -> None:
    facts = message_type(Noted)
    assert (facts.name, facts.topic, facts.version, facts.kind) == (
        "notes.Noted",
        "notes",
        1,
        "event",
    )
    assert message_type(Noted("b")) is facts
    assert re.fullmatch(r".*/sagas\.py:\d+", facts.location)
    born = message_type(Born)
    assert (born.name, born.topic, born.version) == ("family.Born", "family", 1)
    renamed = message_type(Renamed)
    assert (renamed.name, renamed.topic, renamed.version) == ("family.Was", "elsewhere", 3)


def test_an_event_that_is_called_command_is_an_event() -> None:
    class Command(Event, topic="army", name="army.Command"):
        text: str

    class Given(Command):
        by: str

    assert message_type(Command).kind == message_type(Given).kind == "event"


def refused(**options: Any) -> str:
    metaclass: Any = type(Event)
    with pytest.raises(DefinitionError) as caught:
        metaclass("Wrong", (Event,), {}, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {},
            "message Wrong has no topic; expected the stream it travels on; write class Wrong(..., ",
        ),
        (
            {"topic": "a b"},
            "expected a topic of 1-127 letters, digits and ._:- that starts with a ",
        ),
        ({"topic": "a" * 128}, "expected a topic of 1-127 letters"),
        ({"topic": "a", "name": "1x"}, "expected a name of 1-127 letters, digits and ._:- that "),
        ({"topic": "a", "version": 0}, "expected a version of 1 or more, got 0"),
        ({"topic": "a", "colour": "red"}, "colour"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_with_file_and_line(
    options: dict[str, Any], text: str
) -> None:
    said = refused(**options)
    assert re.match(rf"{HERE}:\d+: message Wrong", said)
    assert text in said


def test_the_line_blamed_is_that_of_the_class() -> None:
    with pytest.raises(DefinitionError) as caught:

        class Lost(Event): ...

    file, _, line = caught.value.location.rpartition(":")
    assert file == __file__
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert "class Lost(Event)" in source[int(line) - 1]


def test_two_classes_of_one_name_cannot_be_registered_together() -> None:
    class Twin(Event, topic="notes", name="notes.Noted"): ...

    registry = Registry([Noted, Noted])
    with pytest.raises(DefinitionError) as caught:
        registry.add(Twin)
    said = str(caught.value)
    assert said.startswith(message_type(Twin).location)
    assert (
        f"message name 'notes.Noted' is used twice, here and at {message_type(Noted).location}"
        in said
    )


def test_a_message_is_the_same_bytes_each_time() -> None:
    message = Renamed("x", {"b", "a", "c"}, {"z": 1, "y": 2})
    assert encode_message(message) == (b'{"name":"x","tags":["a","b","c"],"extra":{"y":2,"z":1}}')
    born = Born("x", datetime(2030, 1, 1, tzinfo=UTC))
    assert encode_message(born) == b'{"name":"x","at":"2030-01-01T00:00:00Z"}'


def test_messages_round_trip() -> None:
    registry = Registry([Born, Renamed, Noted])
    for message in (
        Born("x", datetime(2030, 1, 1, tzinfo=UTC)),
        Renamed("x", {"a"}, [1, None, 1 << 70]),
        Noted("b", "\U0001f600 \x00"),
    ):
        assert registry.decode(envelope_of(message, "m")) == message


class Entity:
    id = 1


def nested() -> Any:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.requirement("R51")
@pytest.mark.parametrize("payload", [Entity(), object(), "\ud800", nested(), {1.5j: 1}])
def test_what_is_no_plain_value_cannot_be_recorded(payload: Any) -> None:
    with pytest.raises(NotRecordable) as caught:
        encode_message(Renamed("x", set(), payload))
    assert str(caught.value).startswith(f"event {__name__}.Renamed cannot be encoded: ")
    assert "expected ids and plain values; put the entity's id" in str(caught.value)


def test_values_of_records_are_plain() -> None:
    @dataclass
    class Point:
        x: int

    assert encode_message(Renamed("x", extra=Point(3))).endswith(b'"extra":{"x":3}}')


def test_framework_messages_have_names_of_their_own() -> None:
    assert message_type(CommandDone).name == "sagacity.CommandDone"
    assert issubclass(Command, Message)
    assert issubclass(AccountCreated, msgspec.Struct)
