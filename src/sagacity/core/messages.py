"""Events and commands: immutable, named, versioned records.

A message class carries three facts that never depend on where its code lives:

- ``name``: the type name on the wire, by default ``topic.ClassName``;
- ``topic``: the stream it travels on; inherited by subclasses;
- ``version``: the version of its fields, an integer from 1.

An event says what happened, and anybody may listen. A command says what one service must do: its
topic is the address of that service.
"""

from __future__ import annotations

import inspect
import re
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

import msgspec

from sagacity.core.errors import DefinitionError, NotRecordable

__all__ = [
    "Command",
    "CommandDone",
    "CommandFailed",
    "Event",
    "Message",
    "MessageType",
    "encode_message",
    "message_type",
]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,126}\Z")


class MessageType(msgspec.Struct, frozen=True):
    """The facts of one message class: `name` and `topic` on the wire, field `version`, `kind`."""

    name: str
    topic: str
    version: int
    kind: str
    """``"event"`` or ``"command"``."""
    location: str
    """``file:line`` of the class."""


def caller_location(depth: int) -> str:
    """``file:line`` of the code `depth` frames above the caller of this function."""
    frame = calling_frame(depth + 1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def calling_frame(depth: int) -> FrameType:
    """The frame `depth` above the caller of this function."""
    frame = inspect.currentframe()
    for _ in range(depth + 1):
        frame = frame and frame.f_back
    assert frame is not None
    return frame


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class Message:
        """An immutable record that travels between services; subclass `Event` or `Command`."""

        __message_type__: ClassVar[MessageType]

        def __init_subclass__(
            cls, *, topic: str = "", name: str = "", version: int = 1, abstract: bool = False
        ) -> None: ...

    class Event(Message, abstract=True):
        """Something that happened. Anybody may listen; nobody is asked to."""

    class Command(Message, abstract=True):
        """Something one service must do, and answer. Its topic is that service's address."""

else:

    class _MessageMeta(type(msgspec.Struct)):
        """Reads ``topic=``, ``name=`` and ``version=`` off the class statement."""

        def __new__(
            mcls,
            class_name: str,
            bases: tuple[type, ...],
            namespace: dict[str, Any],
            *,
            topic: str = "",
            name: str = "",
            version: int = 1,
            abstract: bool = False,
            **options: Any,
        ) -> Any:
            location = caller_location(1)
            try:
                cls = super().__new__(
                    mcls, class_name, bases, namespace, **{**options, "frozen": True}
                )
            except TypeError as error:
                raise DefinitionError(f"message {class_name}: {error}", location) from error
            inherited: MessageType | None = getattr(cls, "__message_type__", None)
            topic = topic or (inherited.topic if inherited else "")
            if not abstract and not topic:
                raise DefinitionError(
                    f"message {class_name} has no topic; expected the stream it travels on; "
                    f'write class {class_name}(..., topic="orders") or inherit from a class that has one',
                    location,
                )
            if topic and not _NAME.match(topic):
                raise DefinitionError(
                    f"message {class_name}: expected a topic of 1-127 letters, digits and ._:- "
                    f"that starts with a letter, got {topic!r}",
                    location,
                )
            name = name or (f"{topic}.{class_name}" if topic else class_name)
            if not _NAME.match(name):
                raise DefinitionError(
                    f"message {class_name}: expected a name of 1-127 letters, digits and ._:- "
                    f"that starts with a letter, got {name!r}",
                    location,
                )
            if version < 1:
                raise DefinitionError(
                    f"message {class_name}: expected a version of 1 or more, got {version}",
                    location,
                )
            kind = "command" if cls.__is_command__ else "event"
            cls.__message_type__ = MessageType(name, topic, version, kind, location)
            return cls

    class Message(msgspec.Struct, frozen=True, metaclass=_MessageMeta, abstract=True):
        """An immutable record that travels between services; subclass `Event` or `Command`."""

        __message_type__: ClassVar[MessageType]
        __is_command__: ClassVar[bool] = False

    class Event(Message, abstract=True):
        """Something that happened. Anybody may listen; nobody is asked to."""

    class Command(Message, abstract=True):
        """Something one service must do, and answer. Its topic is that service's address."""

        __is_command__: ClassVar[bool] = True


def message_type(message: Message | type[Message]) -> MessageType:
    """The facts of a message or message class."""
    return message.__message_type__


class CommandDone(Event, topic="sagacity.replies", name="sagacity.CommandDone"):
    """The reply to a command whose handler returned nothing."""

    command_id: str
    command_type: str


class CommandFailed(Event, topic="sagacity.replies", name="sagacity.CommandFailed"):
    """The reply to a command that was refused, or failed until the attempts ran out.

    `refused` True means that it certainly had no effect; False means that nobody knows.
    """

    command_id: str
    command_type: str
    reason: str
    refused: bool
    attempts: int = 0


_encoder = msgspec.json.Encoder(order="deterministic")


def encode_message(message: Message) -> bytes:
    """A message as JSON, the same bytes each time: fields as declared, dict keys and sets sorted.

    Raises NotRecordable for a payload that is no plain value: events carry ids and values, never
    live objects.
    """
    try:
        return _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        kind = type(message)
        raise NotRecordable(
            f"{message_type(message).kind} {kind.__module__}.{kind.__qualname__} cannot be encoded: "
            f"{error}; expected ids and plain values; put the entity's id and the changed values "
            "into the message instead of the object"
        ) from error
