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
from functools import lru_cache
from operator import attrgetter
from typing import Any, cast

import msgspec

from sagacity.core.delivery import (
    ID_BYTES_MAX,
    Envelope,
    checked_id,
    decode_entry,
    encode_entry,
)
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
        self._decoders: dict[str, tuple[msgspec.json.Decoder[Any], int]] = {}
        """Type name -> decoder of its class, and the version of that class."""
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
            self._decoders[facts.name] = msgspec.json.Decoder(cls), facts.version
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
        known = self._decoders.get(envelope.type)
        if known is None:
            raise DecodeError(
                f"message {envelope.id}: type {envelope.type!r} is not known here; expected one of "
                f"{', '.join(sorted(self._classes)) or 'none'}"
            )
        decoder, version = known
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
_OPTIONAL_TEXT = {
    "kind": "kind",
    "source": "source",
    "subject": "subject",
    "correlationid": "correlation_id",
    "causationid": "causation_id",
    "actor": "actor",
    "sagatype": "saga_type",
    "sagakey": "saga_key",
    "sagauid": "saga_uid",
    "replyto": "reply_to",
    "inreplyto": "in_reply_to",
    "undoes": "undoes",
    "traceparent": "traceparent",
    "tracestate": "tracestate",
}
_optional_text_of = attrgetter(*_OPTIONAL_TEXT.values())


def to_fields(envelope: Envelope) -> list[str | bytes]:
    """The flat stream entry of an envelope: names and values in turn, the body last.

    Empty attributes are left out.
    """
    fields: list[str | bytes] = [
        *("specversion", "1.0", "id", envelope.id, "type", envelope.type),
        *("time", _written(envelope.time)),
    ]
    for name, text in zip(_OPTIONAL_TEXT, _optional_text_of(envelope), strict=True):
        if text:
            fields += (name, text)
    if envelope.version != 1:
        fields += ("dataversion", str(envelope.version))
    if envelope.hops:
        fields += ("hops", str(envelope.hops))
    if envelope.sequence:
        fields += ("sequence", str(envelope.sequence))
    if envelope.reply_topics:
        fields += ("replytopics", ",".join(envelope.reply_topics))
    fields += ("data", envelope.body)
    return fields


@lru_cache(maxsize=16)  # the messages of one batch have one time
def _written(us: int) -> str:
    """A time as entries have it: RFC 3339 in UTC."""
    return moment(us).isoformat().replace("+00:00", "Z")


def from_fields(topic: str, fields: Mapping[bytes, bytes]) -> Envelope:
    """The envelope of a stream entry; unknown fields are left out.

    Raises DecodeError for a missing or unusable id, type, time or body.
    """
    if not (b"id" in fields and b"type" in fields and b"data" in fields):
        raise _incomplete(topic, fields)
    get = fields.get
    try:
        topics = get(b"replytopics")
        envelope = Envelope(
            id=fields[b"id"].decode(),
            type=fields[b"type"].decode(),
            topic=topic,
            body=fields[b"data"],
            version=_number(fields, b"dataversion", 1),
            kind=get(b"kind", b"").decode(),
            time=_read(get(b"time")),
            source=get(b"source", b"").decode(),
            subject=get(b"subject", b"").decode(),
            correlation_id=get(b"correlationid", b"").decode(),
            causation_id=get(b"causationid", b"").decode(),
            actor=get(b"actor", b"").decode(),
            hops=_number(fields, b"hops", 0),
            saga_type=get(b"sagatype", b"").decode(),
            saga_key=get(b"sagakey", b"").decode(),
            saga_uid=get(b"sagauid", b"").decode(),
            reply_to=get(b"replyto", b"").decode(),
            reply_topics=tuple(topics.decode().split(",")) if topics else (),
            in_reply_to=get(b"inreplyto", b"").decode(),
            undoes=get(b"undoes", b"").decode(),
            sequence=_number(fields, b"sequence", 0),
            traceparent=get(b"traceparent", b"").decode(),
            tracestate=get(b"tracestate", b"").decode(),
        )
    except (ValueError, OverflowError) as error:
        raise DecodeError(f"entry of topic {topic}: {error}") from error
    names = envelope.id + envelope.type + envelope.saga_key
    # What almost every entry has passes at once: the checks allow more.
    if not (
        len(names) <= ID_BYTES_MAX
        and names.isascii()
        and names.isprintable()
        and envelope.id
        and envelope.type
    ):
        checked_id(envelope.id, f"entry of topic {topic}: id")
        checked_id(envelope.type, f"entry of topic {topic}: type")
        if envelope.saga_key:
            checked_id(envelope.saga_key, f"entry of topic {topic}: sagakey")
    return envelope


def _incomplete(topic: str, fields: Mapping[bytes, bytes]) -> DecodeError:
    wanted = ", ".join(name for name in ("id", "type", "data") if name.encode() not in fields)
    found = ", ".join(sorted(name.decode(errors="replace")[:40] for name in list(fields)[:20]))
    return DecodeError(
        f"entry of topic {topic}: expected the fields id, type and data, got {found or 'none'} "
        f"(missing: {wanted})"
    )


def _number(fields: Mapping[bytes, bytes], name: bytes, default: int) -> int:
    """A number as every database and msgpack take it."""
    value = fields.get(name)
    if value is None:
        return default
    number = int(value) if len(value) <= 19 else 1 << 63
    if not 0 <= number < 1 << 63:
        raise ValueError(
            f"{name.decode()}: expected a number from 0 to 2**63-1, got {value[:40]!r}"
        )
    return number


@lru_cache(maxsize=16)
def _read(time: bytes | None) -> int:
    """The microseconds of a time as entries have it; without a zone it is UTC."""
    if time is None:
        return 0
    sent = datetime.fromisoformat(time.decode())
    return microseconds(sent if sent.tzinfo else sent.replace(tzinfo=UTC))
