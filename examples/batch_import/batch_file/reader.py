"""One pass over a batch file: what makes the file acceptable, and which elements make a record."""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast
from xml.parsers import expat

import msgspec

from examples.batch_import.batch_file.judging import (
    MAX_LINES,
    SPACE,
    Element,
    RecordFault,
    order_from,
    ref_of,
    user_from,
    utc,
)
from examples.batch_import.batch_file.records import (
    NAMESPACE,
    SYSTEMS,
    VERSION,
    BatchHead,
    BatchItem,
    BatchTail,
    FileRefused,
    Kind,
    OrderRecord,
    RefusedRecord,
    Source,
    UserRecord,
)
from examples.batch_import.batch_file.refs import SeenRefs

CHUNK_BYTES: Final = 64 * 1024
MAX_UNKNOWN_PATHS: Final = 100
"""Distinct paths counted in `BatchTail.unknown`; whatever comes later counts as `other`."""

_BATCH_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RECORD_OF: Final = {"users": "user", "orders": "order"}
_LEAVES: Final = {
    "user": frozenset({"email", "name", "phone", "language"}),
    "order": frozenset({"status", "currency", "total"}),
}
_ITEM_OF: Final = {"lines": "line", "accounts": "system"}
_ATTRIBUTES: Final = {
    "batch": frozenset({"id", "source", "created", "version"}),
    "user": frozenset({"ref", "updated"}),
    "order": frozenset({"ref", "user", "updated"}),
    "line": frozenset({"sku", "qty", "price"}),
    "system": frozenset({"code", "plan"}),
}
_NO_ATTRIBUTES: Final[frozenset[str]] = frozenset()
_LOCAL: Final[dict[str, str]] = {
    f"{NAMESPACE} {name}": name
    for name in (
        "batch",
        *_RECORD_OF,
        *_LEAVES,
        *_LEAVES["user"],
        *_LEAVES["order"],
        *_ITEM_OF,
        *_ITEM_OF.values(),
    )
}


class Limits(msgspec.Struct, frozen=True):
    """What a file may not exceed; beyond any of these the whole file is refused.

    `markup_bytes` bounds one tag, comment or instruction and everything before the root element:
    the parser must hold those in memory whole.
    """

    file_bytes: int = 2 * 1024**3
    orders: int = 1_000_000
    depth: int = 8
    text_bytes: int = 4 * 1024
    markup_bytes: int = 64 * 1024


def read_batch(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    systems: frozenset[str] = SYSTEMS,
    limits: Limits | None = None,
) -> Iterator[BatchItem]:
    """Read a batch file once, with memory that does not grow with it.

    Yields a `BatchHead`, one record per `user` and `order` in file order, and a `BatchTail`. Raises
    `FileRefused` where a fault of the file shows, which may be after any number of records; OSError
    comes from the file itself. `systems` are the codes an order may name. The iterator blocks on
    disk: pull it from a worker thread when an event loop runs.
    """
    limits = limits or Limits()
    with SeenRefs() as users, SeenRefs() as orders:
        scan = _Scan(systems, limits, {"user": users, "order": orders})
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb", buffering=0) as file:
                yield from scan.items(file)
        else:
            yield from scan.items(source)


def digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes in hex; with the batch id it identifies the batch."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Scan:
    """The state of one pass. Depth 1 is the root, 2 a section, 3 a record, 4 and 5 its inside."""

    def __init__(self, systems: frozenset[str], limits: Limits, seen: dict[Kind, SeenRefs]) -> None:
        self._systems = systems
        self._limits = limits
        self._seen = seen
        self._ready: deque[BatchItem] = deque()
        self._unknown: Counter[str] = Counter()
        self._accepted: dict[Kind, int] = {"user": 0, "order": 0}
        self._refused = 0
        self._seq = 0
        self._orders = 0
        self._depth = 0
        self._ignoring = 0  # depth of the unknown element being skipped, 0 for none
        self._stray = 0  # characters of stray text since the last tag
        self._path: list[str] = []  # known elements now open
        self._sections: list[str] = []
        self._record: Element | None = None
        self._record_line = 0
        self._container: Element | None = None
        self._leaf: Element | None = None
        # An explicit encoding overrides the declared one, which is checked in _declaration.
        parser = expat.ParserCreate("utf-8", " ")
        parser.buffer_text = True
        parser.XmlDeclHandler = self._declaration
        parser.StartDoctypeDeclHandler = self._doctype
        parser.EntityDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        self._parser = parser

    def items(self, file: BinaryIO) -> Iterator[BatchItem]:
        ready = self._ready
        size = 0
        newlines = 0
        tail_of_character = b""
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            if size > self._limits.file_bytes:
                raise FileRefused(
                    newlines + 1, f"the file exceeds {self._limits.file_bytes} bytes; split it"
                )
            tail_of_character = _check_bytes(tail_of_character + chunk, newlines + 1)
            newlines += chunk.count(b"\n")
            fault = self._feed(chunk, size)
            while ready:
                yield ready.popleft()
            if fault is not None:
                raise fault
        fault = self._parse(b"", final=True)
        if fault is not None:
            raise fault
        yield BatchTail(
            users=self._accepted["user"],
            orders=self._accepted["order"],
            refused=self._refused,
            unknown=dict(self._unknown),
        )

    def _feed(self, chunk: bytes, size: int) -> FileRefused | None:
        if self._depth or self._sections:
            fault = self._parse(chunk)
        else:
            fault = self._feed_prolog(chunk, size)
        # A tag or comment stays in the parser until it is complete: that must have a bound.
        if fault is None and size - self._parser.CurrentByteIndex > self._limits.markup_bytes:
            return self._refusal(
                f"a tag, comment or instruction exceeds {self._limits.markup_bytes} bytes"
            )
        return fault

    def _feed_prolog(self, chunk: bytes, size: int) -> FileRefused | None:
        # pyexpat goes on to the end of its input after a handler raised. Ending the input at every
        # "[" stops at the opening of an internal subset, before its first entity is even declared.
        rest = chunk
        while rest and not self._depth:
            piece, bracket, rest = rest.partition(b"[")
            fault = self._parse(piece + bracket)
            if fault is not None:
                return fault
        if not self._depth and not self._sections and size > self._limits.markup_bytes:
            return self._refusal(
                f"no root element within {self._limits.markup_bytes} bytes; expected batch"
            )
        return self._parse(rest) if rest else None

    def _parse(self, data: bytes, *, final: bool = False) -> FileRefused | None:
        try:
            self._parser.Parse(data, final)
        except FileRefused as fault:
            return fault
        except expat.ExpatError as error:
            what = expat.errors.messages[error.code]
            early = "the file ends early, " if final else ""
            return FileRefused(
                error.lineno,
                f"{early}not well-formed XML: {what} at column {error.offset + 1}; "
                "expected a complete XML 1.0 document",
            )
        return None

    def _refusal(self, reason: str) -> FileRefused:
        return FileRefused(self._parser.CurrentLineNumber, reason)

    # --- expat calls these --------------------------------------------------------------------

    def _declaration(self, version: str, encoding: str | None, _standalone: int) -> None:
        if version != "1.0":
            raise self._refusal(f"the file says XML {version!r}; expected 1.0")
        if encoding is not None and encoding.lower() not in {"utf-8", "us-ascii"}:
            raise self._refusal(f"the file says encoding {encoding!r}; expected UTF-8")

    def _doctype(self, *_: object) -> None:
        raise self._refusal("the file has a document type declaration; expected none")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._stray = 0
        depth = self._depth
        limits = self._limits
        if depth > limits.depth:
            raise self._refusal(
                f"elements are nested {depth} deep; expected at most {limits.depth}"
            )
        for value in attributes.values():
            self._check_length(value)
        if self._ignoring:
            return
        local = _LOCAL.get(name)
        if depth == 1:
            self._start_batch(local, name, attributes)
        elif depth == 2 and local is not None and local in _RECORD_OF:
            self._start_section(local)
        elif depth == 3 and local is not None and local == _RECORD_OF[self._sections[-1]]:
            self._start_record(local, attributes)
        elif depth > 3 and local is not None and self._start_inside(local, attributes):
            pass
        else:
            self._ignoring = depth
            self._count(_readable(name))
            return
        assert local is not None
        self._path.append(local)
        known = _ATTRIBUTES.get(local, _NO_ATTRIBUTES)
        if not attributes.keys() <= known:
            for attribute in attributes.keys() - known:
                self._count("@" + _readable(attribute))

    def _start_batch(self, local: str | None, name: str, attributes: dict[str, str]) -> None:
        if local != "batch":
            found = _readable(name)
            raise self._refusal(f"the root is {found}; expected batch in namespace {NAMESPACE}")
        version = attributes.get("version")
        if version != VERSION:
            raise self._refusal(f"batch version is {version!r}; expected {VERSION!r}")
        batch_id = attributes.get("id", "")
        if _BATCH_ID.fullmatch(batch_id) is None:
            raise self._refusal(f"batch id is {batch_id!r}; expected 1 to 64 of A-Z a-z 0-9 . _ -")
        source = attributes.get("source")
        if source not in {"crm", "logistics"}:
            raise self._refusal(f"batch source is {source!r}; expected crm or logistics")
        text = attributes.get("created", "")
        created = utc(text.strip(SPACE))
        if created is None:
            raise self._refusal(f"batch created is {text!r}; expected a dateTime with zone")
        self._ready.append(BatchHead(batch_id, cast("Source", source), created))

    def _start_section(self, local: str) -> None:
        if local in self._sections:
            raise self._refusal(f"a second {local} section; expected at most one")
        if local == "users" and "orders" in self._sections:
            raise self._refusal("users come after orders; expected the users section first")
        self._sections.append(local)

    def _start_record(self, local: str, attributes: dict[str, str]) -> None:
        if local == "order":
            self._orders += 1
            if self._orders > self._limits.orders:
                raise self._refusal(f"more than {self._limits.orders} orders; split the file")
        self._seq += 1
        self._record = Element(local, attributes)
        self._record_line = self._parser.CurrentLineNumber

    def _start_inside(self, local: str, attributes: dict[str, str]) -> bool:
        """Collect an element of the record; return False if it does not belong here."""
        record, container = self._record, self._container
        if self._depth == 5 and container is not None and _ITEM_OF[container.name] == local:
            container.count += 1
            if container.count <= MAX_LINES:
                container.children.append(Element(local, attributes))
            return True
        if self._depth != 4 or record is None:
            return False
        if local in _LEAVES[record.name]:
            child = self._leaf = Element(local, attributes)
        elif record.name == "order" and local in _ITEM_OF:
            child = self._container = Element(local, attributes)
        else:
            return False
        # One more than the schema knows proves a repetition, so the rest need not be kept.
        if len(record.children) <= len(_LEAVES[record.name]) + len(_ITEM_OF):
            record.children.append(child)
        return True

    def _end(self, _name: str) -> None:
        depth = self._depth
        self._depth = depth - 1
        self._stray = 0
        if self._ignoring:
            if self._ignoring == depth:
                self._ignoring = 0
            return
        self._path.pop()
        if depth == 4:
            self._leaf = self._container = None
        elif depth == 3:
            self._end_record()

    def _end_record(self) -> None:
        record, self._record = self._record, None
        assert record is not None
        kind = cast("Kind", record.name)
        ref = ""
        item: UserRecord | OrderRecord | RefusedRecord
        try:
            ref = ref_of(record)
            item = self._judge(record, kind, ref)
            self._accepted[kind] += 1
        except RecordFault as fault:
            item = RefusedRecord(self._seq, self._record_line, kind, ref, fault.fault, fault.reason)
            self._refused += 1
        self._ready.append(item)

    def _judge(self, record: Element, kind: Kind, ref: str) -> UserRecord | OrderRecord:
        # A ref counts as used even if its first record is refused: which one was meant is unknown.
        if not self._seen[kind].add(ref):
            raise RecordFault("duplicate-ref", f"{kind} {ref!r} occurs again; expected once")
        if kind == "user":
            return user_from(record, self._seq, self._record_line, ref)
        return order_from(record, self._seq, self._record_line, ref, self._systems)

    def _characters(self, data: str) -> None:
        leaf = self._leaf
        if leaf is not None and not self._ignoring:
            leaf.text += data
            self._check_length(leaf.text)
        elif stripped := data.strip(SPACE):
            if not self._stray and not self._ignoring:
                self._count("#text")
            self._stray += len(stripped.encode())
            if self._stray > self._limits.text_bytes:
                raise self._too_long()

    # --- bounds and counts --------------------------------------------------------------------

    def _check_length(self, value: str) -> None:
        most = self._limits.text_bytes
        if len(value) * 4 > most and len(value.encode()) > most:
            raise self._too_long()

    def _too_long(self) -> FileRefused:
        return self._refusal(f"a text exceeds {self._limits.text_bytes} bytes")

    def _count(self, name: str) -> None:
        path = "/".join((*self._path[1:], name))[:200]
        if path not in self._unknown and len(self._unknown) >= MAX_UNKNOWN_PATHS:
            path = "other"
        self._unknown[path] += 1


def _check_bytes(data: bytes, line: int) -> bytes:
    """Refuse NUL and anything that is not UTF-8; return an incomplete character at the end."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise FileRefused(
            line + data.count(b"\n", 0, nul), "the file has a NUL byte; expected text"
        )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return data[error.start :]
        raise FileRefused(
            line + data.count(b"\n", 0, error.start),
            f"byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}); expected UTF-8",
        ) from None
    return b""


def _readable(name: str) -> str:
    """Turn expat's `namespace name` into `{namespace}name`, or only the name for our namespace."""
    namespace, space, local = name.rpartition(" ")
    return f"{{{namespace}}}{local}" if space and namespace != NAMESPACE else local
