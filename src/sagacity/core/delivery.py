"""The envelope around a message, and what arrives from the bus.

Envelope fields use the names of CloudEvents 1.0 where it has one. Ids and keys are text here and
bytes in every database: at most `ID_BYTES_MAX` bytes of UTF-8 without control characters, so that
no collation, truncation or NUL rule of a database can ever merge two of them.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

from sagacity.core.errors import DecodeError
from sagacity.core.messages import Message, encode_message, message_type

ID_BYTES_MAX = 191
"""Longest id or correlation key in bytes of UTF-8 (fits an index key of every database)."""

HOPS_MAX = 64
"""Longest chain of messages that cause each other; a longer one is taken for an endless loop."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One message on its way: header and encoded body. Never changed once it is made.

    Times are microseconds since 1970 in UTC.
    """

    id: str
    """Set by the producer, stable over redelivery and replay. A command's id is its command id."""
    type: str
    """Stable type name of the message class."""
    topic: str
    """The stream it travels on."""
    body: bytes = b"{}"
    """The message, encoded as JSON."""
    version: int = 1
    """Version of the body's fields."""
    kind: str = ""
    """``command`` for a command; empty for an event."""
    time: int = 0
    """When it was recorded."""
    source: str = ""
    """The service that made it."""
    subject: str = ""
    """``EntityType/id`` of the entity that recorded it."""
    correlation_id: str = ""
    """Shared by everything that follows from one first message."""
    causation_id: str = ""
    """Id of the message that led to this one."""
    actor: str = ""
    """Who or what asked for it."""
    hops: int = 0
    """How many messages led here since the first one."""
    saga_type: str = ""
    saga_key: str = ""
    saga_uid: str = ""
    """On a command: the saga instance that sent it. On a reply: the instance it is for."""
    reply_to: str = ""
    """On a command: the topic for replies that the sender does not hear otherwise."""
    reply_topics: tuple[str, ...] = ()
    """On a command: topics the sender listens to anyway."""
    in_reply_to: str = ""
    """On a reply: the command id it answers."""
    undoes: str = ""
    """On an undo command: the id of the command it compensates."""
    sequence: int = 0
    """On a forward command of a saga: its place, from 1, among those of that instance and topic."""
    traceparent: str = ""
    tracestate: str = ""
    """W3C trace context of the span that made the message."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One entry that the bus handed to this consumer.

    Either `envelope` is set, or `fault` says why the entry is not a message and `raw` holds it.
    """

    topic: str
    entry_id: str
    """The bus's own position of the entry; only for acknowledging, never a message id."""
    envelope: Envelope | None = None
    attempt: int = 1
    """How often the bus has handed this entry out."""
    raw: bytes = b""
    """msgpack of the entry's fields as they were read, when it is not a message."""
    fault: str = ""
    """Why the entry is not a message: what, expected, got."""


def enveloped(
    message: Message, *, message_id: str, time: int, topic: str = "", **header: Any
) -> Envelope:
    """A message in its envelope; `topic` only where it does not travel on its own.

    `header` are further fields of `Envelope`. Raises NotRecordable for a payload that cannot be
    encoded.
    """
    facts = message_type(message)
    return Envelope(
        id=message_id,
        type=facts.name,
        topic=topic or facts.topic,
        version=facts.version,
        kind="command" if facts.kind == "command" else "",
        body=encode_message(message),
        time=time,
        **header,
    )


def derived_id(*parts: str) -> str:
    """A stable id: 32 hexadecimal digits of BLAKE2b over `parts`, whatever they contain."""
    told: list[bytes] = []
    for part in parts:
        data = part.encode()
        told += len(data).to_bytes(4, "big"), data
    return blake2b(b"".join(told), digest_size=16).hexdigest()


def spread(*parts: str) -> float:
    """A number in [0, 1) that depends only on `parts`: jitter without a random source."""
    return int(derived_id(*parts)[:13], 16) / float(1 << 52)


def checked_id(value: str, what: str) -> str:
    """`value` if it can be an id or key, else DecodeError saying what is wrong with it.

    One to `ID_BYTES_MAX` bytes of UTF-8, no control characters (``protocol.md`` rows 47 and 91).
    """
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise DecodeError(f"{what}: expected text that UTF-8 can encode, got {value!r}") from error
    if not 0 < size <= ID_BYTES_MAX:
        shown = value if len(value) <= 60 else value[:60] + "..."
        raise DecodeError(f"{what}: expected 1 to {ID_BYTES_MAX} bytes, got {size}: {shown!r}")
    if not value.isprintable() and any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise DecodeError(f"{what}: expected no control characters, got {value!r}")
    return value


_entry_encoder = msgspec.msgpack.Encoder()
_entry_decoder = msgspec.msgpack.Decoder(Envelope)


def encode_entry(envelope: Envelope) -> bytes:
    """An envelope as one msgpack document, for rows that only we read."""
    return _entry_encoder.encode(envelope)


def decode_entry(entry: bytes) -> Envelope:
    """The envelope of `encode_entry`. Raises DecodeError for other bytes."""
    try:
        return _entry_decoder.decode(entry)
    except Exception as error:
        raise DecodeError(f"stored entry: {type(error).__name__}: {error}") from error
