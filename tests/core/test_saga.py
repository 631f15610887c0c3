"""The `Saga` class as its users see it, and the core's independence of everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from sagacity.core.errors import DefinitionError, HandlerError
from sagacity.core.saga import RESERVED, Saga, State, key_text, on, on_done, on_timeout
from tests.core.driver import Numbered, World
from tests.core.sagas import AccountGeneration, Book, Notebook, Opened, Sealed

CHECKOUT = Path(__file__).parents[2]


def test_states_have_the_names_of_their_attributes() -> None:
    assert Notebook.locked.name == "locked"
    assert not Notebook.locked.final
    assert Notebook.sealed.final
    assert repr(Notebook.sealed) == "<State sealed (final)>"
    assert repr(State()) == "<State >"
    file, _, line = Notebook.locked.location.rpartition(":")
    source = Path(file).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1].strip() == "locked = State()"


def test_fields_have_defaults_of_their_own() -> None:
    one, other = AccountGeneration(order_ref="1"), AccountGeneration(order_ref="2")
    one.systems.append("crm")
    assert other.systems == []
    with pytest.raises(TypeError):
        AccountGeneration("1")  # type: ignore[call-arg]


def test_what_a_handler_calls_is_reserved() -> None:
    assert {"send", "publish", "goto", "compensate", "set_timeout", "cancel_timeout"} <= RESERVED
    assert {"correlate", "now", "key", "state", "message", "pending", "new_id"} <= RESERVED


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (7, "7"),
        (-7, "-7"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (type("Text", (str,), {"__str__": lambda self: "other"})("a"), "a"),
    ],
)
def test_keys_as_text(value: object, text: str) -> None:
    assert key_text(value, "key") == text


@pytest.mark.parametrize("value", [None, True, 1.0, b"a", object(), ["a"]])
def test_what_cannot_be_a_key(value: object) -> None:
    with pytest.raises(HandlerError, match="key: expected text, an integer or a UUID, got "):
        key_text(value, "key")


def test_decorators_leave_the_method_as_it_is() -> None:
    def method(self: object) -> None: ...

    marked = on_timeout("end")(on_done(Book)(on(Opened)(method)))
    assert marked is method


def test_a_decorator_for_something_else_than_a_method_says_so() -> None:
    with pytest.raises(DefinitionError, match="handlers are plain methods, got builtin_function"):
        on_done(Book)(print)


def test_two_sagas_hear_the_same_event_apart() -> None:
    class Other(Saga, key="book"):
        begun = State()
        over = State(final=True)
        book: str

        @on(Opened, starts=True, goto=begun)
        def begin(self) -> None: ...

        @on(Sealed, when=begun, goto=over)
        def end(self) -> None: ...

    world, event = World(Notebook, Other), Numbered()
    world.deliver(event(Opened("b")))
    assert {i.type: i.state for i in world.instances.values()} == {
        "Notebook": "locked",
        "Other": "begun",
    }
    assert set(world.inbox) == {("Notebook", "e1"), ("Other", "e1")}


ISOLATED = """
import socket, sys

class Nothing(socket.socket):
    def __new__(cls, *args, **kwargs):
        raise AssertionError("the core opens a socket")

socket.socket = Nothing
socket.create_connection = Nothing

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sqlalchemy", "redis", "opentelemetry", "aiosqlite", "asyncpg"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import pytest
own = [f"tests/core/test_{name}.py" for name in ("decide", "plan", "definition", "diagram")]
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", "-x", *own]))
"""


@pytest.mark.requirement("R27", "R41", "R59")
def test_the_core_needs_no_network_and_no_database_library() -> None:
    """Its tests pass with sockets forbidden and with sqlalchemy and redis not importable."""
    ran = subprocess.run(
        [sys.executable, "-c", ISOLATED], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
