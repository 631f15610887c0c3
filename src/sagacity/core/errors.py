"""Every error the framework raises on purpose.

    SagacityError
    ├── DefinitionError        a message, saga, handler or service is declared wrongly
    ├── HandlerError           a saga handler broke a rule while it ran
    │   ├── Suspended          an ``async def`` saga handler really waited for something
    │   └── LimitExceeded      a step is larger than the limits of its saga allow
    ├── Refused                a participant says a permanent no (users raise this one)
    ├── DecodeError            bytes that are not the message they claim to be
    ├── NotRecordable          an event whose payload cannot be encoded
    ├── KeyTaken               a unique correlation key already belongs to another instance
    ├── StoreError             the database
    │   ├── SchemaError        tables are missing, older, or newer than the code
    │   ├── Unavailable        not reachable now; trying again is right
    │   ├── Conflict           somebody else was first; run the step again
    │   └── DataRefused        the database refuses a value; trying again is useless
    ├── BusError               the message bus
    │   └── BusUnavailable     not reachable now; trying again is right
    └── ConfigurationError     a flag, a URL or an environment variable is wrong

Error texts follow one grammar: what, where, expected, got, what to do.
"""

from __future__ import annotations


class SagacityError(Exception):
    """Root of every error that the framework raises on purpose."""


class DefinitionError(SagacityError):
    """A message, saga, handler or service is declared wrongly.

    Raised while the class or the service is created, never at run time. `location` is
    ``file:line`` of the declaration at fault, or an empty string where it is not known.
    """

    def __init__(self, text: str, location: str = "") -> None:
        super().__init__(f"{location}: {text}" if location else text)
        self.location = location


class HandlerError(SagacityError):
    """A saga handler broke a rule while it ran; its effects are discarded."""


class Suspended(HandlerError):
    """An ``async def`` saga handler really waited for something."""


class LimitExceeded(HandlerError):
    """A step is larger than the limits of its saga allow."""


class Refused(SagacityError):
    """A participant's permanent no.

    Raise it from a command handler: the command is not tried again, its effects in the session
    are rolled back, and the saga that sent it receives the failure with `reason`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DecodeError(SagacityError):
    """Bytes that are not the message they claim to be."""


class NotRecordable(SagacityError):
    """An event whose payload cannot be encoded, such as one that carries an entity."""


class KeyTaken(SagacityError):
    """A unique correlation key already belongs to another saga instance."""

    def __init__(self, saga_type: str, name: str, value: str, owner: str) -> None:
        super().__init__(
            f"{saga_type}: correlation key {name}={value!r} is unique and belongs to instance "
            f"{owner!r}; expected a free value; correlate with another value or drop unique=True"
        )
        self.saga_type, self.name, self.value, self.owner = saga_type, name, value, owner


class StoreError(SagacityError):
    """The database said no."""


class SchemaError(StoreError):
    """Tables are missing, older than the code, or newer than the code."""


class Unavailable(StoreError):
    """The database cannot be reached now, or ended the transaction; trying again is right."""


class Conflict(StoreError):
    """Somebody else was first; nothing was written, run the step again on fresh rows."""


class DataRefused(StoreError):
    """The database refuses a value in this batch; trying the same batch again is useless."""


class BusError(SagacityError):
    """The message bus said no."""


class BusUnavailable(BusError):
    """The bus cannot be reached now; trying again is right."""


class ConfigurationError(SagacityError):
    """A flag, a URL or an environment variable is wrong."""
