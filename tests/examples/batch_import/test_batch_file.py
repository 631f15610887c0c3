"""The reader of batch files: what it yields, what it refuses, and how little memory it takes."""

import hashlib
import io
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples.batch_import.batch_file import (
    BatchHead,
    BatchItem,
    BatchTail,
    FileRefused,
    Limits,
    Line,
    OrderRecord,
    RefusedRecord,
    SystemNeed,
    UserRecord,
    digest,
    read_batch,
)
from examples.batch_import.batch_file.refs import SeenRefs
from tests.examples.batch_import.documents import (
    ROOT,
    document,
    order,
    orders,
    read,
    user,
    users,
)

SAMPLE = document(
    users(
        user("u-1", name="Zoë &amp; Co", more="<phone>+1 555</phone><language>de</language>"),
        user("u-2", email="nobody"),
    )
    + orders(order("o-1", accounts='<system code="billing" plan="plus"/><system code="loyalty"/>'))
)


class Dribble(io.RawIOBase):
    """Data that arrives in pieces of given sizes, as from a slow pipe."""

    def __init__(self, data: bytes, sizes: Iterator[int]) -> None:
        super().__init__()
        self._data = io.BytesIO(data)
        self._sizes = sizes

    def read(self, size: int = -1, /) -> bytes:
        return self._data.read(min(size, next(self._sizes)))


class Stream(io.RawIOBase):
    """A document of any size that exists nowhere as a whole."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        super().__init__()
        self._parts = parts
        self._left = b""

    def read(self, size: int = -1, /) -> bytes:
        while len(self._left) < size and (part := next(self._parts, b"")):
            self._left += part
        data, self._left = self._left[:size], self._left[size:]
        return data


def refused(data: bytes) -> RefusedRecord:
    """Return the only refused record of a document."""
    (record,) = [item for item in read(data) if isinstance(item, RefusedRecord)]
    return record


def file_fault(data: bytes, limits: Limits | None = None) -> FileRefused:
    with pytest.raises(FileRefused) as caught:
        read(data, limits=limits)
    return caught.value


# --- what comes out ----------------------------------------------------------------------------


def test_records_come_in_file_order_between_head_and_tail() -> None:
    instant = datetime(2026, 1, 30, 12, tzinfo=UTC)
    assert read(SAMPLE) == [
        BatchHead("b-1", "crm", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        UserRecord(1, 4, "u-1", instant, "ada@example.test", "Zoë & Co", "+1 555", "de"),
        RefusedRecord(
            2,
            5,
            "user",
            "u-2",
            "bad-email",
            "email is 'nobody'; expected at most 254 characters with one @ inside and no white space",
        ),
        OrderRecord(
            3,
            7,
            "o-1",
            "u-1",
            instant,
            "new",
            "EUR",
            Decimal("3.00"),
            (Line("pen", 2, Decimal("1.50")),),
            (SystemNeed("billing", "plus"), SystemNeed("loyalty")),
        ),
        BatchTail(users=1, orders=1, refused=1, unknown={}),
    ]


@pytest.mark.parametrize(
    "inside", ["", "<users/>", "<orders/>", "<users></users><orders></orders>"]
)
def test_an_empty_batch_is_a_batch(inside: str) -> None:
    head, tail = read(document(inside))
    assert isinstance(head, BatchHead)
    assert tail == BatchTail(users=0, orders=0, refused=0, unknown={})


def test_everything_survives_json() -> None:
    items = read(SAMPLE)
    decoder = msgspec.json.Decoder(BatchItem)
    assert [decoder.decode(msgspec.json.encode(item)) for item in items] == items


def test_prefixes_comments_cdata_and_instructions_are_xml_as_usual() -> None:
    data = (
        b'<b:batch xmlns:b="urn:batch-import:1" id="b" source="logistics" version="1"\n'
        b' created="2026-01-31T12:00:00+02:00"><?note x?><b:users><!-- one --><b:user ref="u"\n'
        b' updated="2026-01-31T12:00:00Z"><b:email><![CDATA[a@b]]></b:email>'
        b"<b:name>A<!-- -->d&#97;</b:name></b:user></b:users></b:batch>"
    )
    head, record, _ = read(data)
    assert isinstance(head, BatchHead)
    assert head.created == datetime(2026, 1, 31, 10, tzinfo=UTC)
    assert isinstance(record, UserRecord)
    assert (record.email, record.name) == ("a@b", "Ada")


def test_a_byte_order_mark_is_fine() -> None:
    assert read(b"\xef\xbb\xbf" + SAMPLE) == read(SAMPLE)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 400))
def test_the_way_the_bytes_arrive_changes_nothing(chance: random.Random, most: int) -> None:
    sizes = iter(lambda: chance.randint(1, most), 0)
    assert list(read_batch(Dribble(SAMPLE, sizes))) == read(SAMPLE)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=200))
def test_names_come_through_unchanged(name: str) -> None:
    _, record, _ = read(document(users(user(name=escape(name)))))
    assert isinstance(record, UserRecord)
    assert record.name == name


def test_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "batch.xml"
    path.write_bytes(SAMPLE)
    assert digest(path) == hashlib.sha256(SAMPLE).hexdigest()


def test_a_path_is_read_like_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "batch.xml"
    path.write_bytes(SAMPLE)
    assert list(read_batch(path)) == list(read_batch(str(path))) == read(SAMPLE)


# --- faults of the file ------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_refused() -> None:
    end = SAMPLE.rindex(b">")
    for length in range(end + 1):
        fault = file_fault(SAMPLE[:length])
        assert "the file ends early" in fault.reason, length
    assert read(SAMPLE[: end + 1]) == read(SAMPLE)


def root(**changed: str | None) -> str:
    attributes = {
        "xmlns": "urn:batch-import:1",
        "id": "b-1",
        "source": "crm",
        "created": "2026-01-31T12:00:00Z",
        "version": "1",
    } | changed
    return "<batch" + "".join(f' {k}="{v}"' for k, v in attributes.items() if v is not None) + ">"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"xmlns": "urn:batch-import:2"}, "the root is {urn:batch-import:2}batch"),
        ({"xmlns": None}, "the root is batch"),
        ({"version": "2"}, "version is '2'"),
        ({"version": None}, "version is None"),
        ({"id": None}, "id is ''"),
        ({"id": "a b"}, "id is 'a b'"),
        ({"id": "b" * 65}, "id is 'bbb"),
        ({"id": "b\u00e9"}, "id is"),
        ({"source": "erp"}, "source is 'erp'"),
        ({"source": None}, "source is None"),
        ({"created": None}, "created is ''"),
        ({"created": "2026-01-31"}, "created is '2026-01-31'"),
        ({"created": "2026-01-31T12:00:00"}, "created is '2026-01-31T12:00:00'"),
        ({"created": "2026-02-30T12:00:00Z"}, "created is"),
        ({"created": "0001-01-01T00:00:00+14:00"}, "created is"),
    ],
)
def test_bad_batch_attributes_refuse_the_file(changed: dict[str, str | None], reason: str) -> None:
    fault = file_fault(document(root=root(**changed)))
    assert reason in fault.reason
    assert fault.line == 2


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"", 1, "no element found"),
        (b"not xml", 1, "not well-formed"),
        (b"<order xmlns='urn:batch-import:1'/>", 1, "the root is order"),
        (document("<users><user></users>"), 3, "mismatched tag"),
        (document() + b"<more/>", 5, "junk after document element"),
        (document("<note>R&D</note>"), 3, "not well-formed"),
        (document("<note>&nbsp;</note>"), 3, "undefined entity"),
        (document("<note>&#0;</note>"), 3, "invalid character number"),
        (document("<x:note/>"), 3, "unbound prefix"),
        (document("<note>\n\0</note>"), 4, "NUL"),
        (document("\n<note>\u00fc</note>").replace(b"\xc3\xbc", b"\xfc"), 4, "0xfc is not UTF-8"),
        (document("<note>x</note>").replace(b"x<", b"\xed\xa0\x80<"), 3, "not UTF-8"),
        (document().decode().encode("utf-16"), 1, "NUL"),
        (b"\xff\xfe" + document(), 1, "0xff is not UTF-8"),
        (document().replace(b"UTF-8", b"ISO-8859-1"), 1, "encoding 'ISO-8859-1'"),
        (document().replace(b'"1.0"', b'"1.1"'), 1, "XML '1.1'"),
        (document(before="<!DOCTYPE batch>"), 2, "document type"),
        (document(before='<!DOCTYPE batch SYSTEM "batch.dtd">'), 2, "document type"),
        (document(before='<!DOCTYPE batch [<!ENTITY a "b">]>'), 2, "document type"),
        (document(before='<!DOCTYPE batch [<!ENTITY % a SYSTEM "x"> %a;]>'), 2, "document type"),
        (document(orders() + "\n" + users()), 5 + 1, "users come after orders"),
        (document(users() + users()), 5, "a second users section"),
        (document(orders() + orders()), 5, "a second orders section"),
    ],
)
def test_faults_of_the_file_are_refused_with_their_line(
    data: bytes, line: int, reason: str
) -> None:
    fault = file_fault(data)
    assert reason in fault.reason
    assert fault.line == line
    assert str(fault) == f"line {line}: {fault.reason}"


def test_entities_are_never_expanded() -> None:
    """Ten levels of ten would be 30 GB; the file is refused at the opening bracket."""
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "lol"}">\n' for n in range(10))
    laughs = document("<note>&e9;</note>", before=f"<!DOCTYPE batch [\n{levels}]>\n")
    tracemalloc.start()
    began = time.perf_counter()
    try:
        fault = file_fault(laughs)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "document type" in fault.reason
    assert fault.line == 2
    assert time.perf_counter() - began < 1
    assert peak < 2 * 1024**2


def test_records_before_a_fault_of_the_file_are_yielded() -> None:
    items = read_batch(io.BytesIO(document(users(user("u-1"), user("u-2")) + "<broken>")))
    seen: list[BatchItem] = []
    with pytest.raises(FileRefused):
        seen.extend(items)  # extend keeps what came before the exception
    assert [item.ref for item in seen if isinstance(item, UserRecord)] == ["u-1", "u-2"]


# --- limits ------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return "<a>" * depth + "</a>" * depth


def test_eight_levels_are_accepted_and_nine_are_not() -> None:
    assert isinstance(read(document(nested(7)))[-1], BatchTail)
    assert "nested 9 deep" in file_fault(document(nested(8))).reason


@pytest.mark.parametrize("letter", ["x", "\u00fc"])
@pytest.mark.parametrize(
    "inside",
    [
        "<note>{}</note>",
        '<note a="{}"/>',
        "<users>{}</users>",
        "<users><user>{}</user></users>",
        "<users><user><email>{}</email></user></users>",
        '<users><user ref="{}"/></users>',
        "<users><user><email><deep>{}</deep></email></user></users>",
    ],
)
def test_a_text_of_4_kib_is_read_and_a_longer_one_refuses_the_file(
    inside: str, letter: str
) -> None:
    fits = 4096 // len(letter.encode())
    assert isinstance(read(document(inside.format(letter * fits)))[-1], BatchTail)
    fault = file_fault(document("\n" + inside.format(letter * (fits + 1))))
    assert fault.reason == "a text exceeds 4096 bytes"
    assert fault.line == 4


def test_a_text_cut_up_by_comments_is_still_one_text() -> None:
    cut = document(users(user(name="<!-- -->".join(["x" * 1000] * 5))))
    assert "a text exceeds" in file_fault(cut).reason


def test_indentation_is_no_text() -> None:
    assert isinstance(read(document(f"<users>{' ' * 100_000}</users>"))[-1], BatchTail)


def test_one_order_more_than_allowed_refuses_the_file() -> None:
    limits = Limits(orders=2)
    two = [order("o-1"), order("o-2")]
    assert isinstance(read(document(orders(*two)), limits=limits)[-1], BatchTail)
    fault = file_fault(document(orders(*two, order("o-3"))), limits)
    assert "more than 2 orders" in fault.reason
    assert fault.line == 6
    assert Limits().orders == 1_000_000


def test_one_byte_more_than_allowed_refuses_the_file() -> None:
    assert read(SAMPLE, limits=Limits(file_bytes=len(SAMPLE))) == read(SAMPLE)
    fault = file_fault(SAMPLE, Limits(file_bytes=len(SAMPLE) - 1))
    assert f"exceeds {len(SAMPLE) - 1} bytes" in fault.reason
    assert Limits().file_bytes == 2 * 1024**3


@pytest.mark.parametrize(
    "parts",
    [
        (b"<!--", b"-", b"-->"),
        (b"<?note ", b"x", b"?>"),
        (b"<note a='", b"x", b"'/>"),
        (b"<note ", b" ", b"/>"),
    ],
)
@pytest.mark.parametrize("prolog", [False, True])
def test_markup_without_end_is_refused_before_it_fills_the_memory(
    parts: tuple[bytes, bytes, bytes], prolog: bool
) -> None:
    def endless() -> Iterator[bytes]:
        if not prolog:
            yield ROOT.encode()
        yield parts[0]
        for _ in range(1000):
            yield parts[1] * 65536

    tracemalloc.start()
    try:
        with pytest.raises(FileRefused, match=r"exceeds 65536 bytes|no root|text exceeds|not well"):
            list(read_batch(Stream(endless())))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024**2


def test_a_record_of_any_length_takes_little_memory() -> None:
    def long_order() -> Iterator[bytes]:
        yield (
            ROOT.encode()
            + b"<orders><order ref='o' user='u' updated='2026-01-30T12:00:00Z'><lines>"
        )
        for _ in range(200):
            yield b"<line sku='pen' qty='2' price='1.50'/>" * 200
        yield b"</lines>" + b"<status>new</status>" * 20_000 + b"</order></orders></batch>"

    tracemalloc.start()
    try:
        _, record, _ = read_batch(Stream(long_order()))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(record, RefusedRecord)
    assert record.fault == "repeated-element"
    assert peak < 4 * 1024**2


# --- faults of one record ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "fault", "reason"),
    [
        (user(""), "bad-ref", "ref has 0 characters; expected 1 to 40"),
        (user("r" * 41), "bad-ref", "ref has 41 characters; expected 1 to 40"),
        (user().replace('ref="u-1" ', ""), "bad-ref", "ref is missing; expected 1 to 40"),
        (user(updated="2026-01-30"), "bad-updated", "updated is '2026-01-30'"),
        (user(updated="2026-01-30T12:00:00"), "bad-updated", "dateTime with zone"),
        (user(updated="2026-01-30T24:00:00Z"), "bad-updated", "dateTime with zone"),
        (user(email=""), "bad-email", "email is ''"),
        (user(email="ada"), "bad-email", "email is 'ada'"),
        (user(email="a@b@c"), "bad-email", "email is 'a@b@c'"),
        (user(email="@b"), "bad-email", "email is '@b'"),
        (user(email="a@"), "bad-email", "email is 'a@'"),
        (user(email="a b@c"), "bad-email", "email is 'a b@c'"),
        (user(email="a&#10;Bcc:x@c"), "bad-email", "email is 'a\\nBcc:x@c'"),
        (user(email="a" * 253 + "@b"), "bad-email", "aaa...'; expected at most 254 characters"),
        (user(name="n" * 201), "bad-name", "name has 201 characters; expected 0 to 200"),
        (user(more=f"<phone>{'1' * 33}</phone>"), "bad-phone", "phone has 33 characters"),
        (user(more="<language>x</language>"), "bad-language", "language has 1 characters"),
        (user(more=f"<language>{'x' * 36}</language>"), "bad-language", "expected 2 to 35"),
        (user(more="<phone/><phone/>"), "repeated-element", "phone occurs more than once"),
        (user().replace("<name>Ada</name>", ""), "missing-element", "name is missing"),
        (user().replace("<email>ada@example.test</email>", ""), "missing-element", "email is"),
    ],
)
def test_faults_of_a_user(record: str, fault: str, reason: str) -> None:
    found = refused(document(users(user("u-0"), record)))
    assert (found.fault, found.line, found.seq, found.kind) == (fault, 5, 2, "user")
    assert reason in found.reason


@pytest.mark.parametrize(
    ("record", "fault", "reason"),
    [
        (order("r" * 41), "bad-ref", "ref has 41 characters"),
        (order(updated="now"), "bad-updated", "updated is 'now'"),
        (order(user_ref=""), "bad-user", "user has 0 characters"),
        (order().replace(' user="u-1"', ""), "bad-user", "user is missing"),
        (order(status="lost"), "bad-status", "expected one of new, paid, shipped, cancelled"),
        (order(currency="EURO"), "bad-currency", "currency is 'EURO'"),
        (order(currency="E1R"), "bad-currency", "currency is 'E1R'"),
        (order(total="-3.00"), "bad-total", "total is '-3.00'"),
        (order(total="3.000"), "bad-total", "total is '3.000'"),
        (order(total="3,00"), "bad-total", "total is '3,00'"),
        (order(total="12345678901.00"), "bad-total", "total is '12345678901.00'"),
        (order(total="NaN"), "bad-total", "total is 'NaN'"),
        (order(total="\u0663"), "bad-total", "total is"),
        (order(total=""), "bad-total", "total is ''"),
        (order(total="3.01"), "total-mismatch", "add up to 3.00; expected the total 3.01"),
        (order(lines=""), "line-count", "the order has 0 lines; expected 1 to 500"),
        (
            order(lines='<line sku="p" qty="1" price="0"/>' * 501),
            "line-count",
            "the order has 501 lines; expected 1 to 500",
        ),
        (order(lines='<line qty="2" price="1.50"/>'), "bad-line", "sku of order line 1 is missing"),
        (order(lines='<line sku="p" qty="0" price="1.50"/>'), "bad-qty", "qty of order line 1 is"),
        (order(lines='<line sku="p" qty="100001" price="1"/>'), "bad-qty", "1 to 100000"),
        (order(lines='<line sku="p" qty="1.5" price="2"/>'), "bad-qty", "is '1.5'"),
        (order(lines='<line sku="p" price="2"/>'), "bad-qty", "is ''"),
        (order(lines='<line sku="p" qty="2" price="-1"/>'), "bad-price", "is '-1'"),
        (order(lines='<line sku="p" qty="2"/>'), "bad-price", "is ''"),
        (order(lines='<line sku="p" qty="2" price="1e2"/>'), "bad-price", "is '1e2'"),
        (order(accounts='<system code="fax"/>'), "unknown-system", "names system 'fax'"),
        (order(accounts="<system/>"), "bad-system", "system code is missing"),
        (
            order(accounts='<system code="billing"/>' * 2),
            "repeated-system",
            "system 'billing' is named twice",
        ),
        (order(accounts='<system code="billing"/>' * 9), "system-count", "names 9 systems"),
        (
            order(accounts=f'<system code="billing" plan="{"p" * 41}"/>'),
            "bad-plan",
            "plan of system billing has 41 characters",
        ),
        (order(more="<status>new</status>"), "repeated-element", "status occurs more than once"),
        (order(more="<lines/>"), "repeated-element", "lines occurs more than once"),
        (order().replace("<status>new</status>", ""), "missing-element", "status is missing"),
    ],
)
def test_faults_of_an_order(record: str, fault: str, reason: str) -> None:
    found = refused(document(users(user()) + "\n" + orders(order("o-0"), record)))
    assert (found.fault, found.line, found.seq, found.kind) == (fault, 8, 3, "order")
    assert reason in found.reason


@pytest.mark.parametrize(
    "record",
    [
        user("r" * 40),
        user(email="a" * 252 + "@b", name=""),
        user(email="\u00e4@\u00f6", name="n" * 200),
        user(more=f"<phone>{'1' * 32}</phone><language>{'x' * 35}</language>"),
        user(more="<phone/><language>xx</language>"),
        user(updated="2026-01-30T12:00:00.123456789-14:00"),
    ],
)
def test_users_at_the_bounds_are_accepted(record: str) -> None:
    assert read(document(users(record)))[-1] == BatchTail(users=1, orders=0, refused=0, unknown={})


@pytest.mark.parametrize(
    "record",
    [
        order(total="0", lines='<line sku="p" qty="1" price="0.000000"/>'),
        order(total="0.30", lines='<line sku="p" qty="3" price="0.1"/>'),
        order(total="0.01", lines='<line sku="p" qty="2" price="0.005"/>'),
        order(total="9999999999.99", lines='<line sku="p" qty="1" price="9999999999.99"/>'),
        order(total="5.00", lines='<line sku="p" qty="1" price="0.01"/>' * 500),
        order(total="1.00", lines=f'<line sku="{"s" * 64}" qty="100000" price="0.00001"/>'),
        order(accounts="".join(f'<system code="{code}"/>' for code in "abcdefgh")),
        order(total=" 3.00\n", status="\tnew "),
        order().replace("<accounts></accounts>", ""),
    ],
)
def test_orders_at_the_bounds_are_accepted(record: str) -> None:
    items = read(document(orders(record)), systems=frozenset("abcdefgh"))
    assert items[-1] == BatchTail(users=0, orders=1, refused=0, unknown={})


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 100_000), st.integers(0, 10**8)), min_size=1, max_size=40
    ).filter(lambda lines: sum(qty * price for qty, price in lines) < 10**12),
    st.integers(-(10**6), 10**6),
)
@example([(3, 10), (7, 20)], 0)
@example([(3, 10)], 1)
def test_totals_are_compared_exactly(lines: list[tuple[int, int]], off_by: int) -> None:
    cents = sum(qty * price for qty, price in lines)
    told = min(max(cents + off_by, 0), 10**12 - 1)
    xml = "".join(
        f'<line sku="p" qty="{qty}" price="{price // 100}.{price % 100:02d}"/>'
        for qty, price in lines
    )
    record = read(document(orders(order(total=f"{told // 100}.{told % 100:02d}", lines=xml))))[1]
    if told == cents:
        assert isinstance(record, OrderRecord)
        assert sum(line.qty * line.price for line in record.lines) == record.total
    else:
        assert isinstance(record, RefusedRecord)
        assert record.fault == "total-mismatch"


def test_the_second_use_of_a_ref_is_refused_in_each_section() -> None:
    items = read(
        document(
            users(user("x"), user("y", email="bad"), user("x"), user("y"))
            + orders(order("x"), order("y"), order("y"))
        )
    )
    found = [
        (item.seq, item.kind, item.ref, item.fault)
        for item in items
        if isinstance(item, RefusedRecord)
    ]
    assert found == [
        (2, "user", "y", "bad-email"),
        (3, "user", "x", "duplicate-ref"),
        (4, "user", "y", "duplicate-ref"),
        (7, "order", "y", "duplicate-ref"),
    ]


# --- what is ignored ---------------------------------------------------------------------------


def test_unknown_elements_attributes_and_stray_text_are_ignored_and_counted() -> None:
    strange = (
        '<user ref="u-1" updated="2026-01-30T12:00:00Z" colour="red">hello'
        "<email>a@b<i>!</i></email><nick><deep/></nick><name/><nick/><order/></user>"
    )
    gifts = order(lines='<line sku="p" qty="3" price="1" x=""/><gift/>')
    xml = "<intro/>" + users(strange, "<order/>") + '<x:more xmlns:x="urn:x"/>' + orders(gifts)
    items = read(document(xml))
    assert isinstance(items[1], UserRecord)
    assert items[1].email == "a@b"
    assert isinstance(items[2], OrderRecord)
    assert items[-1] == BatchTail(
        users=1,
        orders=1,
        refused=0,
        unknown={
            "intro": 1,
            "users/user/@colour": 1,
            "users/user/#text": 1,
            "users/user/email/i": 1,
            "users/user/nick": 2,
            "users/user/order": 1,
            "users/order": 1,
            "{urn:x}more": 1,
            "orders/order/lines/line/@x": 1,
            "orders/order/lines/gift": 1,
        },
    )


def test_inventing_element_names_does_not_fill_the_memory() -> None:
    tail = read(document("".join(f"<n{number}/>" for number in range(1000))))[-1]
    assert isinstance(tail, BatchTail)
    assert len(tail.unknown) == 101
    assert tail.unknown["other"] == 900


# --- robustness and memory ---------------------------------------------------------------------


def outcome(data: bytes) -> None:
    """Read to the end or to FileRefused; any other exception fails the test."""
    with suppress(FileRefused):
        read(data)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_file_refused(data: bytes) -> None:
    outcome(data)
    outcome(ROOT.encode() + data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SAMPLE) - 1), st.integers(0, 20), st.binary(max_size=20))
def test_no_damage_raises_anything_but_file_refused(at: int, cut: int, put: bytes) -> None:
    outcome(SAMPLE[:at] + put + SAMPLE[at + cut :])


def test_seen_refs_is_exact_and_remembers_nothing_afterwards() -> None:
    with SeenRefs() as seen:
        assert [seen.add(ref) for ref in ("a", "A", "a ", "a", "\u00e4", "a\u0308")] == [
            True,
            True,
            True,
            False,
            True,
            True,
        ]
    with SeenRefs() as seen:
        assert seen.add("a")


MILLION = """
import resource, sys
from examples.batch_import.batch_file.refs import SeenRefs
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
with SeenRefs() as seen:
    new = sum(seen.add(f"order-{n * 7919 % 1_000_003:034d}") for n in range(1_000_000))
    again = sum(seen.add(f"order-{n:034d}") for n in range(0, 1_000_000, 1000))
print(new, again, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB only on Linux")
def test_a_million_refs_are_told_apart_in_bounded_memory() -> None:
    """As a Python set they would take more than 130 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION], check=True, capture_output=True, text=True
    )
    new, again, grown_mib = map(int, done.stdout.split())
    assert new == 1_000_000
    assert again <= 1  # 7919 n mod 1000003 leaves out three numbers
    assert grown_mib < 48


FLAT = """
import resource, sys
from examples.batch_import.batch_file import read_batch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
count = sum(1 for _ in read_batch(sys.argv[1]))
print(count, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB only on Linux")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Forty megabytes are read with much less than that."""
    path = tmp_path / "batch.xml"
    with path.open("wb") as file:
        file.write(ROOT.encode() + b"<users>")
        for number in range(40_000):
            more = f"<nick>{'x' * 900}</nick>"
            file.write(user(f"u-{number}", more=more).encode())
        file.write(b"</users></batch>")
    assert path.stat().st_size > 40_000_000
    done = subprocess.run(
        [sys.executable, "-c", FLAT, str(path)], check=True, capture_output=True, text=True
    )
    count, grown_mib = map(int, done.stdout.split())
    assert count == 40_002
    assert grown_mib < 30
