"""Publish and subscribe inside one process: for one execution, for a block, for the application.

    class HailRide(Announces):
        async def __call__(self, passenger: str) -> None: ...
            await self.announce(RideHailed(passenger))

    hail = HailRide().on(RideHailed, show_ride).on(CouldNotHail, show_reason)   # this object only
    application = Listeners()
    application.add(count, RideHailed)                                          # whoever announces
    with listening(spy): ...                                                    # within this block

Nothing here is stored: a listener that fails, or a process that ends, loses what it was told. What
must happen whatever fails belongs into a durable subscriber (see `sagacity.service.subscribes`).
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, Self, TypeVar

import msgspec

from sagacity.core.errors import ConfigurationError, DefinitionError
from sagacity.core.messages import Event, message_type

__all__ = ["Announces", "Listener", "ListenerFailure", "Listeners", "Listening", "listening"]

logger = logging.getLogger("sagacity.listeners")

F = TypeVar("F", bound=Callable[..., Any])

Listener = Callable[[Any], Any]
"""Called with the event; it may be ``async``."""

Selector = type[Event] | str
"""A class of events, subclasses included, or a pattern for type names such as ``rides.*``."""


class ListenerFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A listener raised; the others were told all the same."""

    listener: str
    event: Event
    error: Exception
    traceback: str


class Listening(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One listener and what it wants to hear."""

    listener: Listener
    selectors: tuple[Selector, ...]
    by: type | None
    """Only events that an object of this class announces."""
    name: str

    def wants(self, event: Event, announcer: object) -> bool:
        """True where the listener is to be told."""
        if self.by is not None and not isinstance(announcer, self.by):
            return False
        return not self.selectors or any(_selects(one, event) for one in self.selectors)


def _selects(selector: Selector, event: Event) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(message_type(event).name, selector)
    return isinstance(event, selector)


def _attachment(
    listener: Listener, selectors: tuple[Selector, ...], by: type | None, name: str
) -> Listening:
    given: tuple[object, ...] = selectors  # who calls untyped may give anything
    wrong = [
        one
        for one in given
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, Event))
    ]
    if wrong or not callable(listener):
        raise DefinitionError(
            f"listener: expected a function, then classes of events or patterns of their names, got "
            f"{wrong[0] if wrong else listener!r}"
        )
    name = name or getattr(listener, "__qualname__", type(listener).__qualname__)
    return Listening(listener=listener, selectors=selectors, by=by, name=name)


_in_block: ContextVar[tuple[Listening, ...]] = ContextVar("sagacity_listening", default=())


@contextmanager
def listening(
    listener: Listener, *selectors: Selector, by: type | None = None, name: str = ""
) -> Generator[None]:
    """Has `listener` hear what is told inside the block, by whomever, and nothing afterwards.

    It holds for this task and the tasks started in it; other tasks are not heard.
    """
    token = _in_block.set((*_in_block.get(), _attachment(listener, selectors, by, name)))
    try:
        yield
    finally:
        _in_block.reset(token)


class Listeners:
    """The listeners of an application, or of a part of it.

    An object, not a global: make one where the application is put together, and a new one in a test.
    """

    def __init__(self, *, failures_kept: int = 100) -> None:
        self._attached: list[Listening] = []
        self.failures: deque[ListenerFailure] = deque(maxlen=failures_kept)
        """The latest failures, oldest first."""

    def add(
        self, listener: Listener, *selectors: Selector, by: type | None = None, name: str = ""
    ) -> Listening:
        """Has `listener` hear events of these classes or names; all events where none is given.

        `by` limits it to announcers of one class. Raises DefinitionError for anything else.
        """
        attachment = _attachment(listener, selectors, by, name)
        self._attached.append(attachment)
        return attachment

    def on(self, *selectors: Selector, by: type | None = None, name: str = "") -> Callable[[F], F]:
        """`add` as a decorator."""

        def attach(listener: F) -> F:
            self.add(listener, *selectors, by=by, name=name)
            return listener

        return attach

    def remove(self, attachment: Listening) -> None:
        """Ends what `add` began; ending it twice is no error."""
        self._attached = [one for one in self._attached if one is not attachment]

    async def tell(self, event: Event, *, by: object = None) -> tuple[ListenerFailure, ...]:
        """Tells everybody who wants to hear, one after the other; returns who failed and why.

        `by` is the object that announces. An `async` listener is awaited before the next is told.
        """
        return await _tell((*self._attached, *_in_block.get()), event, by, self.failures)

    def tell_now(self, event: Event, *, by: object = None) -> tuple[ListenerFailure, ...]:
        """`tell` for code that cannot wait; an async listener counts as failed."""
        failures: list[ListenerFailure] = []
        for one in _wanting((*self._attached, *_in_block.get()), event, by):
            try:
                result = one.listener(event)
                if inspect.isawaitable(result):
                    _refuse(one, result)
            except Exception as error:  # noqa: BLE001 - the others are told all the same
                failures.append(_failed(one, event, error))
        self.failures.extend(failures)
        return tuple(failures)

    def __len__(self) -> int:
        return len(self._attached)


class Announces:
    """Gives each object of a class listeners of its own: attach them, run it, drop it.

    For the objects that do something, so their callers learn the outcome; entities record instead
    (see `sagacity.recording.RecordsEvents`). Needs no ``__init__``.
    """

    _own: tuple[Listening, ...] = ()
    _application: tuple[Listeners, ...] = ()

    def on(self, selector: Selector, listener: Listener) -> Self:
        """Has `listener` hear this object's events of a class or name; returns the object."""
        self._own = (*self._own, _attachment(listener, (selector,), None, ""))
        return self

    def announcing_to(self, listeners: Listeners) -> Self:
        """Has this object tell those `listeners` too; returns the object."""
        self._application = (*self._application, listeners)
        return self

    async def announce(self, event: Event) -> tuple[ListenerFailure, ...]:
        """Tells this object's own listeners, then those of the block, then the application's.

        Returns who failed and why; failures are logged, and none stops the others.
        """
        failures = list(await _tell((*self._own, *_in_block.get()), event, self, None))
        for application in self._application:
            attached = tuple(application._attached)  # noqa: SLF001 - same module
            failures += await _tell(attached, event, self, application.failures)
        return tuple(failures)


def _wanting(attached: Iterable[Listening], event: Event, by: object) -> list[Listening]:
    if not isinstance(event, Event):
        raise DefinitionError(f"announcing: expected an event, got {type(event).__qualname__}")
    return [one for one in attached if one.wants(event, by)]


async def _tell(
    attached: Iterable[Listening],
    event: Event,
    by: object,
    kept: deque[ListenerFailure] | None,
) -> tuple[ListenerFailure, ...]:
    failures: list[ListenerFailure] = []
    for one in _wanting(attached, event, by):
        try:
            result = one.listener(event)
            if inspect.isawaitable(result):
                await result
        except Exception as error:  # noqa: BLE001 - the others are told all the same
            failures.append(_failed(one, event, error))
    if kept is not None:
        kept.extend(failures)
    return tuple(failures)


def _refuse(one: Listening, result: Awaitable[Any]) -> None:
    if inspect.iscoroutine(result):
        result.close()
    raise ConfigurationError(
        f"listener {one.name} is async and was told by code that cannot wait; expected a plain function; "
        "announce with `await tell(...)`"
    )


def _failed(one: Listening, event: Event, error: Exception) -> ListenerFailure:
    logger.error(
        "Listener failed, it is not told again (listener=%s, event=%s)",
        one.name,
        message_type(event).name,
        exc_info=error,
    )
    return ListenerFailure(
        listener=one.name,
        event=event,
        error=error,
        traceback="".join(traceback.format_exception(error)),
    )
