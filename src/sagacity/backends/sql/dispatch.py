"""Calling the subscribers that live in the publisher's own process."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, insert

from sagacity.backends.sql.append import new_id, system_time
from sagacity.backends.sql.held import Written
from sagacity.backends.sql.tables import dead_letter
from sagacity.codec import encode_envelope
from sagacity.core.delivery import Envelope
from sagacity.core.errors import ConfigurationError
from sagacity.core.messages import Event
from sagacity.recording import Mode, Subscriber
from sagacity.service import Context

__all__ = ["Recording", "SubscriberFailure", "call", "call_after_commit", "context_of", "wanting"]

logger = logging.getLogger("sagacity.session")


class SubscriberFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A subscriber raised after the commit; what was committed stays."""

    subscriber: str
    envelope: Envelope
    error: str
    """The error with its full traceback."""

    @classmethod
    def of(cls, subscriber: Subscriber, envelope: Envelope, error: Exception) -> SubscriberFailure:
        """The record of an error that is being handled."""
        text = "".join(traceback.format_exception(error))
        return cls(subscriber=subscriber.name, envelope=envelope, error=text)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How the sessions of one service publish."""

    service: str = ""
    """Source of the events."""
    subscribers: tuple[Subscriber, ...] = ()
    """Functions to call here; durable ones are left to the bus."""
    nudge: Callable[[], None] | None = None
    """Called after each commit that wrote events, to wake a relay. May raise without consequence."""
    failed: Callable[[SubscriberFailure], None] | None = None
    """Called for each failure after a commit, beside the log line and the dead letter."""
    now: Callable[[], int] = system_time
    """Microseconds since 1970, UTC, for the outbox rows."""
    new_id: Callable[[], str] = new_id
    """Makes message ids."""
    trace_context: Callable[[], tuple[str, str] | None] | None = None
    """Returns (traceparent, tracestate) of the span at work, if there is one."""
    simulated: bool = False
    """For tests in an outer transaction that is rolled back: takes the session's commit for real."""
    inside: tuple[Subscriber, ...] = field(init=False)
    after: tuple[Subscriber, ...] = field(init=False)

    def __post_init__(self) -> None:
        by_mode = {
            mode: tuple(one for one in self.subscribers if one.mode is mode) for mode in Mode
        }
        object.__setattr__(self, "inside", by_mode[Mode.IN_TRANSACTION])
        object.__setattr__(self, "after", by_mode[Mode.AFTER_COMMIT])


def wanting(subscribers: Iterable[Subscriber], event: Event) -> list[Subscriber]:
    """Who is to be called with an event; once each, also where several of its classes are named."""
    return list({one.name: one for one in subscribers if one.wants(event)}.values())


def context_of(row: Written, recording: Recording, session: Callable[[], Any]) -> Context:
    """What a subscriber of a row learns beside the event; `session` opens its session."""
    source = row.envelope.source or recording.service
    return Context(
        row.envelope, attempt=1, now=recording.now(), source=source, session=session, state=None
    )


def call(function: Callable[..., Any], event: Event, context: Context) -> Awaitable[Any] | None:
    """Calls a subscriber with the event, and with the context where it takes two arguments.

    Returns what is still to be awaited, if anything.
    """
    result = function(event, context) if _takes_context(function) else function(event)
    return result if inspect.isawaitable(result) else None


def _takes_context(function: Callable[..., Any]) -> bool:
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters.values()
    positional = [
        one
        for one in parameters
        if one.kind in {kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD}
        and one.default is kinds.empty
    ]
    return len(positional) > 1 or any(one.kind is kinds.VAR_POSITIONAL for one in parameters)


def call_after_commit(
    recording: Recording,
    rows: Sequence[Written],
    bind: Engine | Connection,
    settle: Callable[[Awaitable[Any] | None], None],
) -> None:
    """Calls the lossy subscribers of committed events: each once, whatever the others do.

    A failure is logged with its traceback and kept as a dead letter that cannot be replayed. When
    the process dies here, or the task is cancelled, the rest is lost: that is the mode's bargain.
    """
    calls = [
        (row, row.event, subscriber)
        for row in rows
        if row.event is not None
        for subscriber in wanting(recording.after, row.event)
    ]
    failures: list[SubscriberFailure] = []
    for done, (row, event, subscriber) in enumerate(calls):
        context = context_of(row, recording, _no_session)
        try:
            settle(call(subscriber.function, event, context))
            _refuse_messages(subscriber, context)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others still run
            failures.append(_failure(subscriber, row, error))
        except BaseException:
            logger.warning(
                "After-commit subscribers were cut short, this mode is lossy (called=%d, lost=%d)",
                done + 1,
                len(calls) - done - 1,
            )
            raise
    if failures:
        _keep(recording, failures, bind)


def _refuse_messages(subscriber: Subscriber, context: Context) -> None:
    if context.outgoing:
        raise ConfigurationError(
            f"subscriber {subscriber.name} sends messages after the commit; expected none, for they would "
            "be lost as easily as it; subscribe it as durable"
        )


def _no_session() -> Any:
    raise ConfigurationError(
        "subscriber: there is no session after the commit; expected a session of your own, or a durable "
        "subscriber, whose context has one"
    )


def _failure(subscriber: Subscriber, row: Written, error: Exception) -> SubscriberFailure:
    logger.error(
        "After-commit subscriber failed, it will not be called again: this mode is lossy "
        "(subscriber=%s, event=%s, message_id=%s, subject=%s)",
        subscriber.name,
        row.envelope.type,
        row.envelope.id,
        row.envelope.subject,
        exc_info=error,
        extra={"correlation_id": row.envelope.correlation_id},
    )
    return SubscriberFailure.of(subscriber, row.envelope, error)


def _keep(
    recording: Recording, failures: Sequence[SubscriberFailure], bind: Engine | Connection
) -> None:
    values = [
        {
            "consumer": failure.subscriber.encode(),
            "message_id": failure.envelope.id.encode(),
            "topic": failure.envelope.topic.encode(),
            "message_type": failure.envelope.type.encode(),
            "reason": "after-commit",
            "error": failure.error.encode(errors="backslashreplace"),
            "attempts": 1,
            "entry": encode_envelope(failure.envelope),
            "decoded": False,  # nobody consumes it from the bus, so there is nothing to replay to
            "saga_type": "",
            "saga_key": b"",
            "lane": b"",
            "sequence": 0,
            "at": recording.now(),
        }
        for failure in failures
    ]
    try:
        if isinstance(bind, Connection):
            with bind.begin_nested():
                bind.execute(insert(dead_letter), values)
        else:
            with bind.begin() as connection:
                connection.execute(insert(dead_letter), values)
    except Exception:
        logger.exception("Failures could not be kept as dead letters (failures=%d)", len(values))
    for failure in failures:
        if recording.failed is not None:
            try:
                recording.failed(failure)
            except Exception:
                logger.exception("Failure hook failed (subscriber=%s)", failure.subscriber)
