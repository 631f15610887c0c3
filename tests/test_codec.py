"""Messages and envelopes as bytes, and back; what cannot be one is refused here, not later."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagacity.codec import (
    Registry,
    decode_envelope,
    encode_envelope,
    encode_headers,
    envelope_from,
    from_fields,
    microseconds,
    moment,
    to_fields,
)
from sagacity.core.delivery import Envelope, encode_entry
from sagacity.core.errors import DecodeError
from sagacity.core.messages import Event
from tests.core.driver import envelope_of

FULL = Envelope(
    id="m",
    type="notes.Noted",
    topic="notes",
    body=b'{"book":"b"}',
    version=3,
    kind="command",
    time=1_800_000_000_123_456,
    source="shop",
    subject="Order/7",
    correlation_id="c",
    causation_id="d",
    actor="ann \u00e9",
    hops=4,
    saga_type="Trip",
    saga_key="t",
    saga_uid="u",
    reply_to="replies",
    reply_topics=("a", "b"),
    in_reply_to="r",
    undoes="x",
    sequence=9,
    traceparent="00-1-2-01",
    tracestate="k=v",
)


def read(envelope: Envelope) -> Envelope:
    """The envelope after a journey through a stream."""
    parts = [part.encode() if isinstance(part, str) else part for part in to_fields(envelope)]
    return from_fields(envelope.topic, dict(zip(parts[::2], parts[1::2], strict=True)))


@pytest.mark.requirement("R1")
@pytest.mark.parametrize("envelope", [FULL, Envelope(id="m", type="t", topic="x")])
def test_an_envelope_survives_stream_and_store(envelope: Envelope) -> None:
    assert read(envelope) == envelope
    assert decode_envelope(encode_envelope(envelope)) == envelope
    assert envelope_from(encode_headers(envelope), envelope.body) == envelope


def test_the_test_above_leaves_no_field_out() -> None:
    for field in msgspec.structs.fields(Envelope):
        assert getattr(FULL, field.name) != field.default, field.name


@given(st.integers(0, (1 << 53) - 1))
def test_times_lose_nothing(us: int) -> None:
    assert microseconds(moment(us)) == us


ENTRY = {b"id": b"m", b"type": b"t", b"data": b"{}"}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({b"id": b""}, "entry of topic x: id: expected 1 to 191 bytes, got 0"),
        ({b"type": b"a\x00b"}, "entry of topic x: type: expected no control characters"),
        ({b"sagakey": b"\n"}, "entry of topic x: sagakey: expected no control characters"),
        ({b"id": b"\xff"}, "entry of topic x: 'utf-8' codec can't decode"),
        ({b"hops": b"many"}, "entry of topic x: invalid literal for int()"),
        (
            {b"hops": b"-1"},
            "entry of topic x: hops: expected a number from 0 to 2**63-1, got b'-1'",
        ),
        ({b"sequence": b"9223372036854775808"}, "sequence: expected a number from 0 to 2**63-1"),
        ({b"dataversion": b"9" * 5000}, "dataversion: expected a number from 0 to 2**63-1"),
        ({b"time": b"yesterday"}, "entry of topic x: Invalid isoformat string: 'yesterday'"),
    ],
)
def test_what_is_no_envelope(changed: dict[bytes, bytes], text: str) -> None:
    with pytest.raises(DecodeError) as caught:
        from_fields("x", {**ENTRY, **changed})
    assert text in str(caught.value)
    assert len(str(caught.value)) < 200


def test_missing_fields_are_named() -> None:
    with pytest.raises(DecodeError, match=r"got type \(missing: id, data\)"):
        from_fields("x", {b"type": b"t"})


@given(st.dictionaries(st.sampled_from([*ENTRY, b"hops", b"time", b"replytopics"]), st.binary()))
def test_whatever_is_read_can_be_stored(fields: dict[bytes, bytes]) -> None:
    try:
        envelope = from_fields("x", {**ENTRY, **fields})
    except DecodeError:
        return
    assert decode_envelope(encode_entry(envelope)) == envelope


class Grown(Event, topic="notes", version=3):
    text: str
    count: int = 0


def test_older_versions_are_brought_up_to_date_step_by_step() -> None:
    registry = Registry(
        [Grown],
        {
            ("notes.Grown", 1): lambda fields: {"words": [fields["word"]]},
            ("notes.Grown", 2): lambda fields: {"text": " ".join(fields["words"])},
        },
    )
    old = msgspec.structs.replace(envelope_of(Grown("x"), "m"), version=1, body=b'{"word":"hello"}')
    assert registry.decode(old) == Grown("hello")
    newer = msgspec.structs.replace(old, version=4)
    with pytest.raises(
        DecodeError, match="has version 4; expected 3 or older; this worker runs older"
    ):
        registry.decode(newer)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b'{"text":7}', b"[" * 100_000, b'{"text":"x","count":1e999}']
)
def test_bodies_that_do_not_fit(body: bytes) -> None:
    registry = Registry([Grown])
    envelope = msgspec.structs.replace(envelope_of(Grown("x"), "m"), body=body)
    with pytest.raises(DecodeError, match=r"message m of type notes\.Grown: "):
        registry.decode(envelope)
    with pytest.raises(
        DecodeError, match=r"type .other. is not known here; expected one of notes\.Grown"
    ):
        registry.decode(msgspec.structs.replace(envelope, type="other"))
