"""Sagas for asyncio: state machines over domain events, with outbox, inbox and compensation.

Declare messages (`Event`, `Command`) and processes (`Saga`), say who does the work (`handles`,
`subscribes`), put them into a `Service`, and run it with ``saga-worker module:service``.
"""

from sagacity.core.errors import (
    ConfigurationError,
    DefinitionError,
    NotRecordable,
    Refused,
    SagacityError,
)
from sagacity.core.messages import Command, CommandDone, CommandFailed, Event
from sagacity.core.routing import Retry
from sagacity.core.saga import Saga, State, defer, ignore, on, on_done, on_failure, on_timeout
from sagacity.listeners import Announces, Listeners, listening
from sagacity.recording import Mode, Origin, RecordsEvents, external_effects, originating
from sagacity.service import Context, Service, handles, subscribes

__all__ = [
    "Announces",
    "Command",
    "CommandDone",
    "CommandFailed",
    "ConfigurationError",
    "Context",
    "DefinitionError",
    "Event",
    "Listeners",
    "Mode",
    "NotRecordable",
    "Origin",
    "RecordsEvents",
    "Refused",
    "Retry",
    "Saga",
    "SagacityError",
    "Service",
    "State",
    "defer",
    "external_effects",
    "handles",
    "ignore",
    "listening",
    "on",
    "on_done",
    "on_failure",
    "on_timeout",
    "originating",
    "subscribes",
]
