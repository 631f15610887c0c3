"""Stream entries as Redis sends them, and the deliveries made of them.

Redis replies differ by server version, by RESP protocol and by release of redis-py; everything here
ends in one shape: a list of (entry id, fields), fields None where the payload is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec

from sagacity.codec import from_fields
from sagacity.core.delivery import Delivery

RAW_VALUE_BYTES_MAX = 4096
"""Of an oversized entry only this much of each field is kept for the dead letter."""

Fields = Mapping[bytes, bytes]
Entries = list[tuple[bytes | None, Fields | None]]


def entry_size(fields: Mapping[Any, bytes | str]) -> int:
    """Bytes of all field names and values, the measure of ``payload_bytes_max`` on both ends."""
    return sum(
        len(part) if isinstance(part, bytes) else len(str(part).encode())
        for pair in fields.items()
        for part in pair
    )


def streams_of(reply: Any) -> list[tuple[bytes, Entries]]:
    """The streams of an XREADGROUP reply.

    RESP2 gives a list of pairs, RESP3 a mapping, whose values redis-py wraps once more in a list.
    """
    if not reply:
        return []
    pairs: Iterable[tuple[bytes, Any]] = (
        cast("Mapping[bytes, Any]", reply).items() if isinstance(reply, Mapping) else reply
    )
    return [(stream, entries_of(entries)) for stream, entries in pairs]


def entries_of(reply: Any) -> Entries:
    """The entries of one stream; an entry without fields has lost its payload (XADD needs one)."""
    if not reply:
        return []
    if len(reply) == 1 and isinstance(reply[0], list):
        reply = reply[0]
    return [(entry[0], entry[1] or None) for entry in reply]


def delivery_of(
    topic: str, entry_id: bytes, fields: Fields | None, *, attempt: int, bytes_max: int
) -> Delivery:
    """The delivery of an entry; whatever cannot be a message becomes one with a fault.

    A fault begins with the reason of the dead letter it will be: ``lost``, ``oversized`` or
    ``undecodable``.
    """
    entry = entry_id.decode()
    if fields is None:
        return lost(topic, entry, attempt=attempt)
    size = entry_size(fields)
    if size > bytes_max:
        return Delivery(
            topic=topic,
            entry_id=entry,
            attempt=attempt,
            raw=raw_of(fields, RAW_VALUE_BYTES_MAX),
            fault=(
                f"oversized: entry {entry} of topic {topic} has {size} bytes; expected at most "
                f"{bytes_max}; each field was cut to {RAW_VALUE_BYTES_MAX} bytes here"
            ),
        )
    try:
        envelope = from_fields(topic, fields)
    # Anything at all may be in a stream, and no entry may stop the reader (protocol.md row 90).
    except Exception as error:  # noqa: BLE001
        return Delivery(
            topic=topic,
            entry_id=entry,
            attempt=attempt,
            raw=raw_of(fields),
            fault=f"undecodable: entry {entry}: {str(error) or type(error).__name__}",
        )
    return Delivery(topic=topic, entry_id=entry, envelope=envelope, attempt=attempt)


def lost(topic: str, entry: str, *, attempt: int = 1) -> Delivery:
    """The delivery of an entry that was deleted or trimmed before it was acknowledged."""
    return Delivery(
        topic=topic,
        entry_id=entry,
        attempt=attempt,
        raw=raw_of({}),
        fault=(
            f"lost: the payload of entry {entry} of topic {topic} is gone; expected it to stay until "
            "every group acknowledged it; look for whoever trims or deletes from this stream"
        ),
    )


def raw_of(fields: Fields, value_bytes_max: int | None = None) -> bytes:
    """The fields as they were read, as msgpack; each value cut to `value_bytes_max` bytes."""
    return msgspec.msgpack.encode(
        {
            bytes(name)[:value_bytes_max]: bytes(value)[:value_bytes_max]
            for name, value in fields.items()
        }
    )


def attempts_of(reply: Sequence[Mapping[str, Any]]) -> dict[bytes, int]:
    """Entry id -> hand-outs, from the detailed form of XPENDING."""
    return {row["message_id"]: int(row["times_delivered"]) for row in reply}
