"""A saga class is validated as a whole, and every complaint names file and line."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from uuid import UUID

import pytest

from sagacity.core.errors import DecodeError, DefinitionError, HandlerError
from sagacity.core.messages import Event, message_type
from sagacity.core.saga import Saga, State, defer, ignore, on, on_failure, on_timeout
from tests.core.driver import Numbered, World, definition_of
from tests.core.sagas import (
    AccountGeneration,
    AccountsNeeded,
    Book,
    EmailConfirmed,
    Notebook,
    Noted,
    Opened,
    Release,
    Sealed,
    Stored,
    Trip,
)

PRELUDE = """\
from datetime import timedelta
from sagacity.core.messages import *
from sagacity.core.saga import *
from tests.core.sagas import *
elsewhere = State()
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A file of its own for the class at fault, so that its source can be read."""
    return tmp_path / "shop.py"


def refusal(module: Path, source: str) -> tuple[str, str]:
    """(text, source of the line that is blamed) of the error that `source` raises."""
    text = PRELUDE + textwrap.dedent(source)
    module.write_text(text)
    with pytest.raises(DefinitionError) as caught:
        exec(compile(text, str(module), "exec"), {"__name__": "shop"})
    found = re.match(r"(.*):(\d+): (.*)", str(caught.value), re.DOTALL)
    assert found is not None, str(caught.value)
    assert found[1] == str(module)
    assert caught.value.location == f"{module}:{found[2]}"
    return found[3], text.splitlines()[int(found[2]) - 1].strip()


BODY = """\
class S(Saga, key="book"):
    opened = State()
    shut = State(final=True)
    book: str
    notes: list[str] = []
    @on(Opened, starts=True, goto=opened)
    def begin(self): ...
    @on(Sealed, when=opened, goto=shut)
    def seal(self): ...
"""


def body(*lines: str, **replaced: str) -> str:
    """`BODY` with some lines replaced (by what they contain) and others added."""
    text = BODY
    for old, new in replaced.items():
        (line,) = [each for each in text.splitlines() if old in each]
        text = text.replace(line + "\n", f"    {new}\n" if new else "")
    return text + "".join(f"    {line}\n" for line in lines)


CASES: dict[str, tuple[str, str, str]] = {
    # name: (source, text, blamed line)
    "unknown key field": (
        BODY.replace('key="book"', 'key="title"'),
        (
            "saga S: key field 'title' is not declared; expected one of book, notes; "
            "add the annotation title: str"
        ),
        'class S(Saga, key="title"):',
    ),
    "no states": (
        'class S(Saga, key="book"):\n    book: str\n',
        (
            "saga S: expected at least one State() attribute, got none; "
            "write e.g. done = State(final=True)"
        ),
        'class S(Saga, key="book"):',
    ),
    "unreachable state": (
        body("lost = State()", "@on(Noted, when=lost, goto=shut)", "def find(self): ..."),
        (
            "saga S: state 'lost' is unreachable; expected a handler with goto=lost on a way from the "
            "start"
        ),
        "lost = State()",
    ),
    "state nobody leaves": (
        body("end = State()", "@on(Noted, when=opened, goto=end)", "def finish(self): ..."),
        (
            "saga S: state 'end' is not final and nobody leaves it; expected a handler with when=end and "
            "another goto=, or State(final=True)"
        ),
        "end = State()",
    ),
    "one state with two names": (
        body("again = opened"),
        "saga S: state 'opened' is called 'again' too; expected a State() of its own for each name",
        "opened = State()",
    ),
    "undeclared goto": (
        body("@on(Noted, when=opened, goto=opened)", "def note(self):", "    self.goto(self.shut)"),
        (
            "saga S: handler note goes to 'shut', which is not declared; expected one of opened; "
            "add it to goto="
        ),
        "self.goto(self.shut)",
    ),
    "goto to nowhere": (
        body("@on(Noted, when=opened)", "def note(self):", "    self.goto(self.shutt)"),
        (
            "saga S: handler note goes to 'shutt', which is not declared; expected one of opened; "
            "add it to goto="
        ),
        "self.goto(self.shutt)",
    ),
    "goto= of another saga": (
        body("@on(Noted, when=opened, goto=elsewhere)", "def note(self): ..."),
        "saga S: goto=<State > is not a state of this saga; expected one of opened, shut",
        "@on(Noted, when=opened, goto=elsewhere)",
    ),
    "when= of another saga": (
        body("@on(Noted, when=Notebook.locked)", "def note(self): ..."),
        "saga S: when=<State locked> is not a state of this saga; expected one of opened, shut",
        "@on(Noted, when=Notebook.locked)",
    ),
    "when= of no state": (
        body("@on(Noted, when=())", "def note(self): ..."),
        (
            "saga S: handler note handles notes.Noted in no state, when=() is empty; expected states, or "
            "no when= for every state that is not final"
        ),
        "@on(Noted, when=())",
    ),
    "two handlers for one state and event": (
        body("@on(Noted)", "def one(self): ...", "@on(Noted, when=opened)", "def two(self): ..."),
        (
            "saga S: notes.Noted in state 'opened' has two handlers, one at {file}:15 and two; "
            "expected one; narrow one of them with when="
        ),
        "@on(Noted, when=opened)",
    ),
    "two handlers for one start": (
        body("@on(Opened, starts=True, goto=shut)", "def other(self): ..."),
        (
            "saga S: notes.Opened in state '(start)' has two handlers, begin at {file}:11 and other; "
            "expected one; narrow one of them with when="
        ),
        "@on(Opened, starts=True, goto=shut)",
    ),
    "start missing": (
        'class S(Saga, key="book"):\n    book: str\n    shut = State(final=True)\n',
        "saga S: no event starts it; expected an @on(..., starts=True, goto=...)",
        'class S(Saga, key="book"):',
    ),
    "start without goto": (
        body("@on(Noted, starts=True)", "def other(self): ..."),
        "saga S: handler other starts the saga but has no goto=; expected the first state",
        "@on(Noted, starts=True)",
    ),
    "final state with handler": (
        body("@on(Noted, when=shut)", "def late(self): ..."),
        (
            "saga S: handler late handles notes.Noted in the final state 'shut'; expected a state that is "
            "not final: nothing happens after the end"
        ),
        "@on(Noted, when=shut)",
    ),
    "timeout never handled": (
        body("@on(Noted)", "def note(self):", "    self.set_timeout('end', after=timedelta(1))"),
        (
            "saga S: note sets timeout 'end', which nobody handles; expected one of none; "
            "add @on_timeout('end')"
        ),
        "self.set_timeout('end', after=timedelta(1))",
    ),
    "timeout never set": (
        body("@on_timeout('end', when=opened, goto=shut)", "def end(self): ..."),
        "saga S: timeout 'end' is handled but never set; expected a self.set_timeout('end', ...)",
        "@on_timeout('end', when=opened, goto=shut)",
    ),
    "timeout name": (
        body("@on_timeout('', when=opened, goto=shut)", "def end(self): ..."),
        "saga S: @on_timeout: timeout name: expected 1 to 191 bytes, got 0: ''",
        "@on_timeout('', when=opened, goto=shut)",
    ),
    "timeout of a class": (
        body("@on_timeout(Noted, when=opened, goto=shut)", "def end(self): ..."),
        "saga S: @on_timeout expects the name of a timeout, got <class 'tests.core.sagas.Noted'>",
        "@on_timeout(Noted, when=opened, goto=shut)",
    ),
    "command as event": (
        body("@on(Book)", "def late(self): ..."),
        "saga S: @on expects event classes, got <class 'tests.core.sagas.Book'>",
        "@on(Book)",
    ),
    "event as command": (
        body("@on_failure(Noted)", "def late(self): ..."),
        "saga S: @on_failure expects command classes, got <class 'tests.core.sagas.Noted'>",
        "@on_failure(Noted)",
    ),
    "failures by @on": (
        body("@on(CommandFailed)", "def late(self): ..."),
        "saga S: @on does not take CommandFailed; expected @on_failure(TheCommand)",
        "@on(CommandFailed)",
    ),
    "no event": (
        body("@on()", "def late(self): ..."),
        "@on needs an event class, got none",
        "@on()",
    ),
    "no command": (
        body("@on_done()", "def late(self): ..."),
        "@on_done needs a command class, got none",
        "@on_done()",
    ),
    "too many arguments": (
        body("@on(Noted)", "def note(self, event, more): ..."),
        "saga S: handler note takes (self, event, more); expected (self) or (self, message)",
        "@on(Noted)",
    ),
    "no arguments": (
        body("@on(Noted)", "def note(): ..."),
        "saga S: handler note takes (); expected (self) or (self, message)",
        "@on(Noted)",
    ),
    "keyword arguments": (
        body("@on(Noted)", "def note(self, *, event): ..."),
        "saga S: handler note takes (self, *, event); expected (self) or (self, message)",
        "@on(Noted)",
    ),
    "not a method": (
        body("@on(Noted)", "@staticmethod", "def note(event): ..."),
        (
            "@event handlers are plain methods, got staticmethod; expected the decorator directly above "
            "def, below no other"
        ),
        "@on(Noted)",
    ),
    "reserved field": (
        body("pending: list[str] = []"),
        (
            "saga S: 'pending' is what a handler calls as self.pending; expected another name for the "
            "field"
        ),
        'class S(Saga, key="book"):',
    ),
    "reserved state": (
        body("state = State()"),
        "saga S: 'state' is what a handler calls as self.state; expected another name for the state",
        "state = State()",
    ),
    "reserved method": (
        body("def publish(self): ..."),
        (
            "saga S: 'publish' is what a handler calls as self.publish; expected another name for the "
            "method"
        ),
        "def publish(self): ...",
    ),
    "field without default": (
        body("title: str"),
        (
            "saga S: field 'title' has no default; expected one, because an instance is created before "
            "any handler fills it"
        ),
        'class S(Saga, key="book"):',
    ),
    "field of an unknown type": (
        body("title: 'Unknown' = None"),
        (
            "saga S: a field has a type that cannot be resolved: name 'Unknown' is not defined; "
            "expected a type at module level"
        ),
        'class S(Saga, key="book"):',
    ),
    "field that cannot be stored": (
        body("title: dict[list, int | str | list[str] | dict[tuple, set] | tuple] = None"),
        "saga S: a field has a type that cannot be stored: ",
        'class S(Saga, key="book"):',
    ),
    "filled mutable default": (
        body("title: list[str] = ['a']"),
        "saga S: as a default value is unsafe",
        'class S(Saga, key="book"):',
    ),
    "key field missing in a start event": (
        body("@on(EmailConfirmed, starts=True, goto=shut)", "def other(self): ..."),
        (
            "saga S: handler other: event users.EmailConfirmed has no field 'book' to correlate by; "
            "expected one of user_ref; name it with field="
        ),
        "@on(EmailConfirmed, starts=True, goto=shut)",
    ),
    "further key missing in an event": (
        body("@on(Noted, key='user')", "def other(self): ..."),
        (
            "saga S: handler other: event notes.Noted has no field 'user' to correlate by; expected one "
            "of book, text; name it with field="
        ),
        "@on(Noted, key='user')",
    ),
    "field= missing in an event": (
        body("@on(Noted, field='user')", "def other(self): ..."),
        (
            "saga S: handler other: event notes.Noted has no field 'user' to correlate by; expected one "
            "of book, text; name it with field="
        ),
        "@on(Noted, field='user')",
    ),
    "start by a further key": (
        body("@on(Noted, key='text', starts=True, goto=shut)", "def other(self): ..."),
        (
            "saga S: handler other starts the saga by the further key 'text'; expected the saga's own key "
            "'book': it names the new instance"
        ),
        "@on(Noted, key='text', starts=True, goto=shut)",
    ),
    "two routes for one event": (
        body(
            "more = State()",
            "@on(Stored, when=opened, goto=more)",
            "def one(self): ...",
            "@on(Stored, key='text', when=more, goto=shut)",
            "def two(self): ...",
        ),
        (
            "saga S: event notes.Stored is correlated in two ways, here and at {file}:16; expected the "
            "same key= and field= everywhere"
        ),
        "@on(Stored, key='text', when=more, goto=shut)",
    ),
    "two policies for one missing instance": (
        body(
            "more = State()",
            "@on(Stored, when=opened, goto=more, missing='ignore')",
            "def one(self): ...",
            "@on(Stored, when=more, goto=shut, missing='dead-letter')",
            "def two(self): ...",
        ),
        (
            "saga S: event notes.Stored has missing='dead-letter' here and 'ignore' at {file}:16; expected "
            "one policy for each event"
        ),
        "@on(Stored, when=more, goto=shut, missing='dead-letter')",
    ),
    "two classes of one name": (
        "class Twin(Event, topic='notes', name='notes.Noted'):\n    book: str\n"
        + body("@on(Noted)", "def one(self): ...", "@on(Twin)", "def two(self): ..."),
        "saga S: two event classes are called 'notes.Noted', at ",
        "@on(Twin)",
    ),
    "correlation nobody looks by": (
        body("@on(Noted)", "def note(self):", "    self.correlate('user', 'x')"),
        (
            "saga S: note correlates by 'user', which no handler looks by; expected one of none; "
            "add key='user' to an @on"
        ),
        "self.correlate('user', 'x')",
    ),
    "ignore() of a command": (
        body("ignore(Book)"),
        "saga S: ignore() expects event classes, got <class 'tests.core.sagas.Book'>",
        "ignore(Book)",
    ),
    "ignore() in a state of another saga": (
        body("ignore(Noted, when=elsewhere)"),
        "saga S: ignore() when=<State > is not a state of this saga; expected one of opened, shut",
        "ignore(Noted, when=elsewhere)",
    ),
    "ignore() of what is handled": (
        body("ignore(Sealed, when=opened)"),
        (
            "saga S: ignore() names notes.Sealed in state 'opened', which has a handler for it; expected "
            "a state without one"
        ),
        "ignore(Sealed, when=opened)",
    ),
    "defer() of what never comes": (
        body("defer(Noted, when=opened)"),
        (
            "saga S: defer() keeps notes.Noted in state 'opened', but no state that can follow handles "
            "it; expected an @on for it there, or ignore()"
        ),
        "defer(Noted, when=opened)",
    ),
    "ignored and deferred": (
        body("ignore(Noted)", "defer(Noted)"),
        (
            "saga S: notes.Noted in state 'opened' is both ignored and deferred, here and at {file}:15; "
            "expected one of them"
        ),
        "defer(Noted)",
    ),
    "ignore() outside a class": (
        "ignore(Noted)\n",
        "ignore() belongs into the body of a saga class",
        "ignore(Noted)",
    ),
    "saga name": (
        BODY.replace('key="book"', 'key="book", name="orders#1"'),
        (
            "saga orders#1: expected a name of 1-127 letters, digits and ._:- that starts with a letter, "
            "got 'orders#1'; give it one with name="
        ),
        'class S(Saga, key="book", name="orders#1"):',
    ),
    "saga version": (
        BODY.replace('key="book"', 'key="book", version=0'),
        "saga S: expected a version of 1 or more, got 0",
        'class S(Saga, key="book", version=0):',
    ),
    "unknown option": (
        BODY.replace('key="book"', 'keys="book"'),
        "saga S: ",
        'class S(Saga, keys="book"):',
    ),
    "event without a topic": (
        "class Lost(Event):\n    book: str\n",
        (
            "message Lost has no topic; expected the stream it travels on; write "
            'class Lost(..., topic="orders") or inherit from a class that has one'
        ),
        "class Lost(Event):",
    ),
}


@pytest.mark.requirement("R63")
@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_with_file_and_line(name: str, module: Path) -> None:
    source, text, blamed = CASES[name]
    said, line = refusal(module, source)
    expected = text.format(file=module) if "{file}" in text else text
    if "unsafe" in text:
        assert "saga S: " in said
        assert "default value" in said
    elif text.endswith((": ", "at ")):
        assert said.startswith(expected)
        assert len(said) > len(expected)
    else:
        assert said == expected
    assert line == blamed


def test_a_handler_in_a_file_that_cannot_be_read_is_given_the_benefit_of_the_doubt() -> None:
    space: dict[str, object] = {"__name__": "nowhere"}
    text = PRELUDE + body(
        "@on(Noted)",
        "def note(self): self.set_timeout('end', after=timedelta(1))",
        "@on_timeout('end', goto=shut)",
        "def end(self): ...",
    )
    exec(compile(text, "<nowhere>", "exec"), space)
    assert "S" in space


# -------------------------------------------------------------------------- what must not be refused


def test_compensation_may_stand_in_another_method() -> None:
    """A state is left by compensation, wherever that is asked for."""

    def outside(saga: Saga) -> None:
        saga.compensate("from outside")

    class Indirect(Saga, key="book"):
        opened = State()
        second = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=(opened, second, shut))
        def begin(self) -> None:
            self.goto(self.opened)

        @on(Sealed, when=opened)
        def seal(this) -> None:  # noqa: N805
            this.fail()

        def fail(self) -> None:
            self.really_fail()

        def really_fail(self) -> None:
            text = """
not indented: a quoted letter
"""
            self.compensate(text)

        @on(Sealed, when=second)
        def seal_second(self) -> None:
            outside(self)

    world, event = World(Indirect), Numbered()
    world.deliver(event(Opened("b")), event(Sealed("b")))
    assert world.one("b").status == "compensated"
    assert {h.name for h in definition_of(Indirect).handlers if h.compensates} == {
        "seal",
        "seal_second",
    }


def test_a_timeout_may_be_set_by_a_variable_or_outside() -> None:
    def outside(saga: Saga) -> None: ...

    class Variable(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None:
            outside(self)

        @on_timeout("end", when=opened, goto=shut)
        def end(self) -> None: ...

    assert definition_of(Variable).timeouts == {"end"}


def test_a_computed_state_is_checked_when_it_is_gone_to() -> None:
    class Computed(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @property
        def following(self) -> State:
            return type(self).shut if self.book == "good" else Notebook.locked

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Sealed, when=opened, goto=(opened, shut))
        def seal(self) -> None:
            self.goto(self.following)

    world, event = World(Computed), Numbered()
    world.deliver(event(Opened("good")), event(Sealed("good")))
    world.deliver(event(Opened("bad")), event(Sealed("bad")))
    assert world.one("good").state == "shut"
    (row,) = world.parked.values()
    assert "goto 'locked' is not declared; expected one of opened, shut" in row.error


def test_an_argument_with_a_default_takes_the_message() -> None:
    class Defaulted(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str
        notes: list[str] = []

        @on(Opened, starts=True, goto=opened)
        @on(Noted, when=opened)
        def begin(self, event: Opened | Noted | None = None) -> None:
            self.notes.append(type(event).__name__)

        @on(Sealed, when=opened, goto=shut)
        def seal(self, *messages: Sealed) -> None:
            self.notes.append(type(messages[0]).__name__)

    world, event = World(Defaulted), Numbered()
    world.deliver(event(Opened("b")), event(Noted("b")), event(Sealed("b")))
    assert world.saga("b").notes == ["Opened", "Noted", "Sealed"]


# ------------------------------------------------------------------------------- classes in a family


class Closing:
    """A mixin that is no saga."""

    closing = State()
    over = State(final=True)

    @on(Sealed, when=closing, goto=over)
    def close(self) -> None: ...


class Basic(Closing, Saga, abstract=True):
    opened = State()
    book: str
    notes: list[str] = []

    ignore(Noted)

    @on(Opened, starts=True, goto=opened)
    def begin(self) -> None:
        self.notes.append("basic")

    @on(Stored, when=opened, goto=Closing.closing)
    def stored(self) -> None: ...


class Derived(Basic, key="book"):
    defer(Noted, when=Basic.opened)

    def begin(self) -> None:
        self.notes.append("derived")

    @on(Noted, when=Closing.closing)
    def note(self, event: Noted) -> None:
        self.notes.append(event.text)


class Dropped(Basic, key="book"):
    stored = None  # type: ignore[assignment]

    @on(Noted, when=Basic.opened, goto=Closing.closing)
    def note(self) -> None: ...


def test_handlers_states_and_policies_are_inherited_overridden_and_dropped() -> None:
    assert "__definition__" not in vars(Basic)
    world, event = World(Derived), Numbered()
    world.deliver(event(Opened("b")), event(Noted("b", "early")), event(Stored("b", "")))
    world.deliver(event(Sealed("b")))
    assert world.saga("b").notes == ["derived", "early"]
    assert world.one("b").state == "over"
    assert [h.name for h in definition_of(Derived).handlers] == ["close", "begin", "stored", "note"]
    assert "stored" not in {h.name for h in definition_of(Dropped).handlers}
    assert definition_of(Dropped).policies["closing", "notes.Noted"] == "ignore"


# -------------------------------------------------------------------------------- what it knows


@pytest.mark.requirement("R38")
def test_the_table_says_what_happens_where() -> None:
    definition = definition_of(AccountGeneration)
    assert repr(definition) == "<Definition AccountGeneration of 4 states>"
    assert definition.final == {"ready", "refused"}
    assert definition.reachable == {
        "waiting": {"creating", "refused", "ready"},
        "creating": {"creating", "ready", "refused"},
        "ready": frozenset(),
        "refused": frozenset(),
    }
    assert list(definition.starts) == ["orders.AccountsNeeded"]
    handler = definition.handler("creating", "failure", "accounts.CreateAccount")
    assert handler is not None
    assert (handler.name, handler.takes, handler.compensates) == ("give_up", False, True)
    assert definition.handler("waiting", "failure", "accounts.CreateAccount") is None
    assert definition.waits("waiting", "event", "accounts.AccountCreated")
    assert not definition.waits("creating", "event", "users.EmailConfirmed")


def test_what_it_sends_is_read_from_its_source() -> None:
    sendings = definition_of(AccountGeneration).sendings
    assert [(s.method, s.message.name, s.undo and s.undo.name) for s in sendings] == [
        ("create", "accounts.CreateAccount", "accounts.ReleaseAccount")
    ]
    (sending,) = sendings
    file, _, line = sending.location.rpartition(":")
    assert "self.send(" in Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_what_it_sends_by_a_variable_or_a_choice_is_read_too() -> None:
    class Varied(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None:
            command = Book("x")
            undo = Release("x")
            self.send(command, undo=undo)
            self.publish(Later("x") if self.book else Stored("b", ""))

        @on(Sealed, when=opened, goto=shut)
        def seal(self) -> None: ...

    class Later(Event, topic="notes"):
        text: str

    assert [(s.message.name, s.undo and s.undo.name) for s in definition_of(Varied).sendings] == [
        ("bookings.Book", "bookings.Release"),
        ("notes.Later", None),
        ("notes.Stored", None),
    ]


# ---------------------------------------------------------------------------------- keys and data


def test_keys_of_events() -> None:
    class Many(Event, topic="notes"):
        books: frozenset[str]
        number: int | None = None

    class Reader(Saga, key="book"):
        opened = State()
        shut = State(final=True)
        book: str

        @on(Opened, starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Many, field="books", when=opened, goto=shut)
        def seal(self) -> None: ...

        @on(Noted, field=lambda event: {"n": event.text}["m"], when=opened)
        def note(self) -> None: ...

    routes = definition_of(Reader).routes
    many = routes[message_type(Many).name]
    assert many.keys(Many(frozenset({"b", "c", "a"}))) == ("a", "b", "c")
    assert many.keys(Many(frozenset())) == ()
    with pytest.raises(DecodeError, match="correlation key: expected 1 to 191 bytes, got 0"):
        many.keys(Many(frozenset({""})))
    with pytest.raises(DecodeError, match=r"notes.Noted: correlation key: KeyError: 'm'"):
        routes["notes.Noted"].keys(Noted("b"))
    by_number = on(Many, field="number", starts=True, goto=State())
    assert callable(by_number)


UUID_TEXT = "6f0a1c9e-2b7d-4f57-9d0f-7f3f3c5d8a11"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seven", "key 'seven' does not fit number: Invalid UUID"),
        (UUID_TEXT.upper(), f"does not fit number: it would be written '{UUID_TEXT}'"),
    ],
)
def test_a_key_that_does_not_fit_its_field(key: str, text: str) -> None:
    class Numbers(Saga, key="number"):
        opened = State()
        shut = State(final=True)
        number: UUID

        @on(Opened, field="book", starts=True, goto=opened)
        def begin(self) -> None: ...

        @on(Sealed, field="book", when=opened, goto=shut)
        def seal(self) -> None: ...

    definition = definition_of(Numbers)
    assert definition.key_of(definition.new(UUID_TEXT)) == UUID_TEXT
    with pytest.raises(DecodeError, match=re.escape(text)):
        definition.new(key)


def test_data_that_does_not_fit() -> None:
    definition = definition_of(Notebook)
    with pytest.raises(
        DecodeError, match="Notebook: stored data does not fit the class: Validation"
    ):
        definition.decode(b'{"book":7}')
    notebook = definition.new("b")
    notebook.notes = object()  # type: ignore[attr-defined]
    with pytest.raises(HandlerError, match="Notebook: the data cannot be stored: "):
        definition.encode(notebook)


def test_a_class_that_is_only_read_keeps_its_definition() -> None:
    assert definition_of(Trip) is Trip.__definition__
    assert definition_of(Trip).cls is Trip
    assert EmailConfirmed is definition_of(AccountGeneration).routes["users.EmailConfirmed"].event
    assert AccountsNeeded is definition_of(AccountGeneration).routes["orders.AccountsNeeded"].event
    assert on_failure(Book) is not None
