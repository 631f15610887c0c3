"""Messages and envelopes as bytes, and the registry of message types.

Three forms of an envelope, all lossless:

- *fields*: the flat entry of a stream, under CloudEvents 1.0 attribute names, body under ``data``;
- *headers and body*: two JSON documents, for rows that people read with SQL;
- *entry*: one msgpack document, for rows that only we read.

Types are found only through a `Registry` of classes named in code: no message can name an import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec

from sagacity.core.delivery import Envelope, checked_id, decode_entry, encode_entry
from sagacity.core.errors import DecodeError, DefinitionError
from sagacity.core.messages import Message, MessageType, encode_message, message_type

__all__ = [
    "Registry",
    "Upcaster",
    "decode_envelope",
    "encode_envelope",
    "encode_headers",
    "encode_message",
    "envelope_from",
    "from_fields",
    "microseconds",
    "moment",
    "to_fields",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)


def microseconds(moment: datetime) -> int:
    """An aware datetime as microseconds since 1970, UTC."""
    return (moment - _EPOCH) // _US


def moment(us: int) -> datetime:
    """Microseconds since 1970 as an aware datetime in UTC."""
    return _EPOCH + us * _US


# ---------------------------------------------------------------------------------------- messages

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes the fields of one version of a message and returns those of the next."""


class Registry:
    """The message types one service knows, by name.

    `upcasters` maps (type name, version) to the function that turns that version's fields into the
    next one's; they are applied one after the other until the class's version is reached.
    """

    def __init__(
        self,
        classes: Iterable[type[Message]] = (),
        upcasters: Mapping[tuple[str, int], Upcaster] | None = None,
    ) -> None:
        self._classes: dict[str, type[Message]] = {}
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {}
        self._upcasters = dict(upcasters or {})
        for cls in classes:
            self.add(cls)

    def add(self, cls: type[Message]) -> None:
        """Makes a class known. Raises DefinitionError where its name belongs to another one."""
        facts = message_type(cls)
        known = self._classes.get(facts.name)
        if known is cls:
            return
        if known is not None:
            other = message_type(known)
            raise DefinitionError(
                f"message name {facts.name!r} is used twice, here and at {other.location}; expected one "
                'class for each name; give one of them another name with name="..."',
                facts.location,
            )
        try:
            self._decoders[facts.name] = msgspec.json.Decoder(cls)
        except (TypeError, NameError) as error:
            raise DefinitionError(
                f"message {facts.name}: a field has a type that cannot be decoded: {error}",
                facts.location,
            ) from error
        self._classes[facts.name] = cls

    def __contains__(self, name: str) -> bool:
        return name in self._classes

    def get(self, name: str) -> type[Message] | None:
        """The class of a type name, or None."""
        return self._classes.get(name)

    def types(self) -> list[MessageType]:
        """The known types, sorted by name."""
        return [message_type(self._classes[name]) for name in sorted(self._classes)]

    def decode(self, envelope: Envelope) -> Message:
        """The message in an envelope, at the version of our class.

        A version that has no upcaster is taken to fit the next one. Raises DecodeError for an unknown
        type, a version newer than the code, or a body that does not fit the class.
        """
        decoder = self._decoders.get(envelope.type)
        if decoder is None:
            raise DecodeError(
                f"message {envelope.id}: type {envelope.type!r} is not known here; expected one of "
                f"{', '.join(sorted(self._classes)) or 'none'}"
            )
        version = message_type(self._classes[envelope.type]).version
        body = envelope.body
        try:
            if envelope.version != version:
                body = self._upcast(envelope, version)
            return cast("Message", decoder.decode(body))
        except DecodeError:
            raise
        # RecursionError and UnicodeDecodeError are no MsgspecError (protocol.md M18).
        except Exception as error:
            raise DecodeError(
                f"message {envelope.id} of type {envelope.type}: {type(error).__name__}: {error}"
            ) from error

    def _upcast(self, envelope: Envelope, version: int) -> bytes:
        if envelope.version > version:
            raise DecodeError(
                f"message {envelope.id} of type {envelope.type} has version {envelope.version}; "
                f"expected {version} or older; this worker runs older code than the sender"
            )
        fields = msgspec.json.decode(envelope.body)
        for step in range(envelope.version, version):
            upcaster = self._upcasters.get((envelope.type, step))
            if upcaster is not None:
                fields = upcaster(fields)
        return msgspec.json.encode(fields)


# --------------------------------------------------------------------------------------- envelopes

_headers_encoder = msgspec.json.Encoder()
_headers_decoder = msgspec.json.Decoder(Envelope)


encode_envelope, decode_envelope = encode_entry, decode_entry
"""The *entry* form of an envelope, and back."""


def encode_headers(envelope: Envelope) -> bytes:
    """The *headers* of an envelope: JSON without the body."""
    return _headers_encoder.encode(msgspec.structs.replace(envelope, body=b"{}"))


def envelope_from(headers: bytes, body: bytes) -> Envelope:
    """The envelope of *headers and body*. Raises DecodeError for other bytes."""
    try:
        return msgspec.structs.replace(_headers_decoder.decode(headers), body=body)
    except Exception as error:
        raise DecodeError(f"stored headers: {type(error).__name__}: {error}") from error


# (field name in the entry, attribute of the envelope): lower case, letters and digits only.
_TEXT_FIELDS: tuple[tuple[str, str], ...] = (
    ("id", "id"),
    ("type", "type"),
    ("kind", "kind"),
    ("source", "source"),
    ("subject", "subject"),
    ("correlationid", "correlation_id"),
    ("causationid", "causation_id"),
    ("actor", "actor"),
    ("sagatype", "saga_type"),
    ("sagakey", "saga_key"),
    ("sagauid", "saga_uid"),
    ("replyto", "reply_to"),
    ("inreplyto", "in_reply_to"),
    ("undoes", "undoes"),
    ("traceparent", "traceparent"),
    ("tracestate", "tracestate"),
)
_NUMBER_FIELDS: tuple[tuple[str, str, int], ...] = (
    ("dataversion", "version", 1),
    ("hops", "hops", 0),
    ("sequence", "sequence", 0),
)
_KNOWN_TEXT = {name.encode(): attribute for name, attribute in _TEXT_FIELDS}
_KNOWN_NUMBER = {name.encode(): attribute for name, attribute, _ in _NUMBER_FIELDS}


def to_fields(envelope: Envelope) -> dict[str, bytes | str]:
    """The flat stream entry of an envelope; empty attributes are left out."""
    fields: dict[str, bytes | str] = {
        "specversion": "1.0",
        "id": envelope.id,
        "type": envelope.type,
        "time": moment(envelope.time).isoformat().replace("+00:00", "Z"),
    }
    for name, attribute in _TEXT_FIELDS[2:]:
        value = getattr(envelope, attribute)
        if value:
            fields[name] = value
    for name, attribute, default in _NUMBER_FIELDS:
        number = getattr(envelope, attribute)
        if number != default:
            fields[name] = str(number)
    if envelope.reply_topics:
        fields["replytopics"] = ",".join(envelope.reply_topics)
    fields["data"] = envelope.body
    return fields


def _count(value: bytes, name: bytes) -> int:
    """A number as every database and msgpack take it."""
    number = int(value) if len(value) <= 19 else 1 << 63
    if not 0 <= number < 1 << 63:
        raise ValueError(
            f"{name.decode()}: expected a number from 0 to 2**63-1, got {value[:40]!r}"
        )
    return number


def from_fields(topic: str, fields: Mapping[bytes, bytes]) -> Envelope:
    """The envelope of a stream entry; unknown fields are left out.

    Raises DecodeError for a missing or unusable id, type, time or body.
    """
    values: dict[str, Any] = {}
    try:
        for name, value in fields.items():
            attribute = _KNOWN_TEXT.get(name)
            if attribute is not None:
                values[attribute] = value.decode()
            elif name in _KNOWN_NUMBER:
                values[_KNOWN_NUMBER[name]] = _count(value, name)
        if b"time" in fields:
            sent = datetime.fromisoformat(fields[b"time"].decode())
            values["time"] = microseconds(sent if sent.tzinfo else sent.replace(tzinfo=UTC))
        if fields.get(b"replytopics"):
            values["reply_topics"] = tuple(fields[b"replytopics"].decode().split(","))
    except (ValueError, OverflowError) as error:
        raise DecodeError(f"entry of topic {topic}: {error}") from error
    missing = [name for name in ("id", "type") if name not in values]
    if missing or b"data" not in fields:
        wanted = ", ".join([*missing, *(["data"] if b"data" not in fields else [])])
        found = ", ".join(sorted(name.decode(errors="replace")[:40] for name in list(fields)[:20]))
        raise DecodeError(
            f"entry of topic {topic}: expected the fields id, type and data, got {found or 'none'} "
            f"(missing: {wanted})"
        )
    checked_id(values["id"], f"entry of topic {topic}: id")
    checked_id(values["type"], f"entry of topic {topic}: type")
    if values.get("saga_key"):
        checked_id(values["saga_key"], f"entry of topic {topic}: sagakey")
    return Envelope(topic=topic, body=fields[b"data"], **values)
