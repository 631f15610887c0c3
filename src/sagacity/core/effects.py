"""What a saga handler may ask for. A handler only records these; `decide` gives them meaning.

Messages are encoded the moment they are handed over, so that nothing the handler does later to a
list inside one can change what is sent.
"""

from __future__ import annotations

import msgspec

from sagacity.core.messages import MessageType


class Encoded(msgspec.Struct, frozen=True):
    """A message as it will leave."""

    type: MessageType
    body: bytes


class Send(msgspec.Struct, frozen=True):
    """Send `command`; should the saga compensate, send `undo`."""

    command: Encoded
    undo: Encoded | None
    command_id: str


class Publish(msgspec.Struct, frozen=True):
    """Publish `event` to whoever listens."""

    event: Encoded
    message_id: str


class SetTimeout(msgspec.Struct, frozen=True):
    """Arm timeout `name` for `due_at` (microseconds since 1970, UTC), replacing an older one."""

    name: str
    due_at: int


class CancelTimeout(msgspec.Struct, frozen=True):
    """Disarm timeout `name`; not armed is no error."""

    name: str


class Correlate(msgspec.Struct, frozen=True):
    """Let events find this instance by `name` = `value` too."""

    name: str
    value: str
    unique: bool


Effect = Send | Publish | SetTimeout | CancelTimeout | Correlate
