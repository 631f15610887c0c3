"""Stream entries as Redis sends them, and the deliveries made of them.

Redis replies differ by server version and by RESP protocol; everything here ends in one shape: a
list of (entry id, flat fields), the fields None where the payload is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from sagacity.codec import from_fields
from sagacity.core.delivery import Delivery

RAW_VALUE_BYTES_MAX = 4096
"""Of an oversized entry only this much of each field is kept for the dead letter."""

Flat = Sequence[bytes]
"""Names and values in turn."""
Entry = tuple[bytes, Flat | None]


def entry_size(fields: Sequence[bytes | str]) -> int:
    """Bytes of all field names and values, the measure of ``payload_bytes_max`` on both ends."""
    return sum(len(part) if isinstance(part, bytes) else len(part.encode()) for part in fields)


def streams_of(reply: Any) -> list[tuple[bytes, Sequence[Entry]]]:
    """The streams of an XREADGROUP reply: RESP2 gives a list of pairs, RESP3 a mapping."""
    if isinstance(reply, Mapping):
        return list(cast("Mapping[bytes, Sequence[Entry]]", reply).items())
    return reply or []


def delivery_of(
    topic: str, entry_id: bytes, flat: Flat | None, size: int, attempt: int, bytes_max: int
) -> Delivery:
    """The delivery of an entry of `size` bytes; whatever cannot be a message becomes one with a fault.

    A fault begins with the reason of the dead letter it will be: ``lost``, ``oversized`` or
    ``undecodable``.
    """
    entry = entry_id.decode()
    if flat is None:
        return lost(topic, entry, attempt=attempt)
    parts = iter(flat)
    fields = dict(zip(parts, parts, strict=True))
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


def raw_of(fields: Mapping[bytes, bytes], value_bytes_max: int | None = None) -> bytes:
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
