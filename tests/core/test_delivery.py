"""Envelopes, ids and what can be one."""

from __future__ import annotations

import contextlib
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagacity.core.delivery import (
    ID_BYTES_MAX,
    Delivery,
    Envelope,
    checked_id,
    decode_entry,
    derived_id,
    encode_entry,
    spread,
)
from sagacity.core.errors import DecodeError


@pytest.mark.requirement("R1")
def test_an_envelope_cannot_be_changed() -> None:
    envelope = Envelope(id="m", type="t", topic="x")
    with pytest.raises(AttributeError):
        envelope.id = "n"  # type: ignore[misc]


@given(st.builds(Envelope, id=st.text(), type=st.text(), topic=st.text(), body=st.binary()))
def test_envelopes_survive_the_store(envelope: Envelope) -> None:
    assert decode_entry(encode_entry(envelope)) == envelope


def test_every_field_survives_the_store() -> None:
    values: dict[str, object] = {}
    for number, field in enumerate(msgspec.structs.fields(Envelope)):
        kinds: dict[object, object] = {str: f"v{number}", int: number, bytes: b"[%d]" % number}
        values[field.name] = kinds.get(field.type, ("a", "b"))
    envelope = Envelope(**values)  # type: ignore[arg-type]
    assert decode_entry(encode_entry(envelope)) == envelope


@given(st.binary(max_size=200))
def test_other_bytes_are_told_apart(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        assert isinstance(decode_entry(data), Envelope)


def test_derived_ids_do_not_depend_on_where_the_parts_are_cut() -> None:
    assert derived_id("ab", "c") != derived_id("a", "bc") != derived_id("abc")
    assert derived_id("", "a") != derived_id("a", "")
    assert derived_id("ab", "c") == derived_id("ab", "c")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_derived_ids_are_ids(parts: list[str]) -> None:
    made = derived_id(*parts)
    assert len(made) == 32
    assert set(made) <= set(string.hexdigits.lower())
    assert checked_id(made, "id") == made
    assert 0 <= spread(*parts) < 1


def test_a_derived_id_never_changes() -> None:
    """They are stored: another release must make the same ones."""
    assert derived_id("uid", "message", "1", "bookings.Book") == "8b525efea90117c7d78041a3b205b3be"


@pytest.mark.parametrize("good", ["a", "é" * 95, "a" * ID_BYTES_MAX, "a b#c/d", "\U0001f600"])
def test_good_ids(good: str) -> None:
    assert checked_id(good, "id") == good


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("", "id: expected 1 to 191 bytes, got 0: ''"),
        ("é" * 96, "id: expected 1 to 191 bytes, got 192: '"),
        ("a" * 600, "a...'"),
        ("a\x00b", "id: expected no control characters, got 'a\\x00b'"),
        ("a\nb", "expected no control characters"),
        ("a\x7fb", "expected no control characters"),
        ("\ud800", "id: expected text that UTF-8 can encode, got '\\ud800'"),
    ],
)
def test_bad_ids(bad: str, text: str) -> None:
    with pytest.raises(DecodeError) as caught:
        checked_id(bad, "id")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 150


def test_a_delivery_is_a_message_or_says_why_not() -> None:
    assert Delivery(topic="t", entry_id="1-0", fault="no id").envelope is None
