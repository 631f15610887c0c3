"""Who makes and who takes each message of some services.

Read off the declarations, nothing runs: what sagas send and publish as their source shows, what
command handlers return as their annotations say, and everything that listens. Events that entities
record are made in code that no declaration shows; such an event has no maker here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import msgspec

from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope
from sagacity.core.messages import Message, MessageType, message_type
from sagacity.service import Participant, Service
from sagacity.worker.logs import escaped

__all__ = ["Entry", "catalog", "listed", "unhandled"]


class Entry(msgspec.Struct):
    """One message type. Makers and takers are ``service: function`` and sorted."""

    name: str
    kind: str
    topic: str
    version: int
    made_by: list[str]
    taken_by: list[str]


def catalog(services: Sequence[Service]) -> list[Entry]:
    """The messages of `services`, by name."""
    entries: dict[str, Entry] = {}

    def entry(facts: MessageType) -> Entry:
        return entries.setdefault(
            facts.name, Entry(facts.name, facts.kind, facts.topic, facts.version, [], [])
        )

    for service in services:
        for definition in service.definitions:
            for facts, maker in _made_by_saga(definition):
                entry(facts).made_by.append(f"{service.name}: {maker}")
            for route in definition.routes.values():
                entry(message_type(route.event))
        for participant in [*service.commands.values(), *service.subscribers.values()]:
            for cls in _family(participant.message):
                entry(message_type(cls))
            for cls in _returned(participant.function):
                maker = f"{service.name}: {participant.name} (reply)"
                entry(message_type(cls)).made_by.append(maker)
        for subscriber in service.local_subscribers:
            for cls in _family(subscriber.event):
                name = subscriber.name.removeprefix(f"{service.name}.")
                taker = f"{service.name}: {name} ({subscriber.mode.value})"
                entry(message_type(cls)).taken_by.append(taker)
    for found in entries.values():
        for service in services:
            found.taken_by += [f"{service.name}: {taker}" for taker in _takers(service, found)]
        found.made_by = sorted(set(found.made_by))
        found.taken_by = sorted(set(found.taken_by))
    return [entries[name] for name in sorted(entries)]


def unhandled(entries: Sequence[Entry]) -> list[Entry]:
    """Commands that somebody here sends and nobody here handles."""
    return [
        entry
        for entry in entries
        if entry.kind == "command" and entry.made_by and not _handlers(entry)
    ]


def listed(entries: Sequence[Entry]) -> list[str]:
    """The catalog as lines; the same services give the same lines, so that they can be compared."""
    lines: list[str] = []
    for entry in entries:
        version = f" v{entry.version}" if entry.version > 1 else ""
        name = click.style(escaped(entry.name), bold=True)
        lines.append(f"{name}  {entry.kind}{version} on {escaped(entry.topic)}")
        lines += [f"  from  {escaped(maker)}" for maker in entry.made_by]
        lines += [f"  to    {escaped(taker)}" for taker in entry.taken_by]
        if entry in unhandled([entry]):
            lines.append(click.style("  nobody here handles it", fg="yellow"))
    return lines


def _handlers(entry: Entry) -> list[str]:
    """Takers of a command that do what it says, not those that wait for its outcome."""
    return [taker for taker in entry.taken_by if not taker.endswith(")")]


def _made_by_saga(definition: Definition) -> Iterator[tuple[MessageType, str]]:
    for sending in definition.sendings:
        maker = f"{definition.saga_type}.{sending.method}"
        yield sending.message, maker
        if sending.undo is not None:
            yield sending.undo, f"{maker} (undo)"


def _takers(service: Service, entry: Entry) -> Iterator[str]:
    words = {"failure": " (its failure)", "done": " (its success)"}
    for definition in service.definitions:
        for handler in definition.handlers:
            if handler.trigger == entry.name and handler.kind != "timeout":
                yield f"{definition.saga_type}.{handler.name}{words.get(handler.kind, '')}"
    envelope = Envelope(id="catalog", type=entry.name, topic=entry.topic)
    yield from (participant.name for participant in _participants(service, envelope))


def _participants(service: Service, envelope: Envelope) -> Iterator[Participant]:
    yield from (participant for _, participant in service.participants(envelope))


def _family(cls: type[Message]) -> Iterator[type[Message]]:
    """A class and everything below it, without the ones that have no topic."""
    if message_type(cls).topic:
        yield cls
    for below in cls.__subclasses__():
        yield from _family(below)


def _returned(function: Callable[..., Any]) -> list[type[Message]]:
    """The message classes in the return annotation; none where it cannot be read."""
    try:
        annotation: Any = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):
        return []
    found: list[type[Message]] = []
    waiting = [annotation]
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, Message) and message_type(one).topic:
            found.append(one)
        waiting.extend(typing.get_args(one))
    return found
