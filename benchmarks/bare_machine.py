"""The sagas of `benchmarks.imports` as plain code: entries of streams in, rows and commands out.

No framework and nothing general: a dictionary from (state, message) to a function. What it writes
is what Sagacity writes, row for row and of the same size; see `benchmarks.bare`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import msgspec

GROUP = "imports"
TOPICS = ("imports", "imports.replies", "items")
"""What the group reads."""

Row = tuple[Any, ...]


class Body(msgspec.Struct):
    """The body of every event and reply; each has some of the fields."""

    import_id: str = ""
    document: str = ""
    last_step_fails: bool = False
    shelf: str = ""
    item: int = 0


class Data(msgspec.Struct):
    """The fields of the saga ImportUser."""

    import_id: str
    document: str = ""
    last_step_fails: bool = False


class Shelf(msgspec.Struct):
    """The fields of the saga Shelf."""

    shelf: str
    items: int = 0


class Undo(msgspec.Struct):
    """What takes a command back."""

    command_id: str
    type: str
    topic: str
    undo_type: str
    undo_version: int
    undo_body: bytes
    confirmed: bool = False


class Ledger(msgspec.Struct, omit_defaults=True):
    """What a saga remembers beside its fields."""

    undo: list[Undo] = []
    sequence: dict[str, int] = {}
    compensation: dict[str, str] = {}
    correlation_id: str = ""
    steps: int = 0


class Headers(msgspec.Struct, omit_defaults=True):
    """The envelope of an outbox row."""

    id: str
    type: str
    topic: str
    kind: str = "event"
    time: int = 0
    source: str = ""
    correlation_id: str = ""
    causation_id: str = ""
    hops: int = 0
    saga_type: str = ""
    saga_key: str = ""
    saga_uid: str = ""
    reply_to: str = ""
    reply_topics: tuple[str, ...] = ()
    sequence: int = 0
    undoes: str = ""


class Message:
    """One entry as it was read."""

    __slots__ = ("body", "entry", "fields", "id", "saga_key", "saga_type", "stream", "type")

    def __init__(self, stream: bytes, entry: bytes, flat: Sequence[bytes]) -> None:
        self.stream, self.entry = stream, entry
        self.fields = fields = dict(zip(flat[::2], flat[1::2], strict=True))
        self.id, self.type = fields[b"id"], fields[b"type"]
        self.body = _body(fields[b"data"])
        hot = self.type == b"bench.ItemCounted"
        self.saga_type = "Shelf" if hot else "ImportUser"
        key = self.body.shelf if hot else self.body.import_id
        self.saga_key = key.encode() if key else fields[b"sagakey"]


class Instance:
    """A saga in memory."""

    __slots__ = ("data", "key", "ledger", "started", "state", "status", "type", "uid", "version")

    def __init__(self, kind: str, key: bytes, data: Any, now: int) -> None:
        self.type, self.key, self.data, self.started = kind, key, data, now
        self.uid = os.urandom(16).hex()
        self.version, self.status, self.state = 0, "running", ""
        self.ledger = Ledger()


@dataclass(slots=True)
class Writes:
    """The rows of one batch, as `bare_stores` names their columns, and what to publish.

    What is the same for all of a batch is not in the rows: its time, and the version of the schema.
    """

    now: int
    inserts: list[Row] = field(default_factory=list)
    updates: list[Row] = field(default_factory=list)
    inbox: list[Row] = field(default_factory=list)
    outbox: list[Row] = field(default_factory=list)
    transitions: list[Row] = field(default_factory=list)
    commands: list[Row] = field(default_factory=list)
    """XADD, one for each outbox row."""


_body = msgspec.json.Decoder(Body).decode
_data = {
    "ImportUser": msgspec.json.Decoder(Data).decode,
    "Shelf": msgspec.json.Decoder(Shelf).decode,
}
_ledger = msgspec.msgpack.Decoder(Ledger).decode
_json = msgspec.json.Encoder().encode
_pack = msgspec.msgpack.Encoder().encode


def loaded(row: Any) -> Instance:
    """The instance of a row of `bare_stores.SAGA`."""
    kind, key, uid, version, status, state, data, ledger, started = row
    instance = Instance.__new__(Instance)
    instance.type, instance.key, instance.uid = kind, key, uid.decode()
    instance.version, instance.status, instance.state = version, status, state
    instance.data, instance.ledger, instance.started = _data[kind](data), _ledger(ledger), started
    return instance


class Batch:
    """One batch on its way from entries to rows."""

    def __init__(self, prefix: str, now: int) -> None:
        self.prefix, self.now = prefix, now
        self.time = datetime.fromtimestamp(now / 1e6, UTC).isoformat(timespec="microseconds")[:-6]
        self.writes = Writes(now)
        self.message: Message
        self.sent: list[tuple[str, str, str]] = []

    def __call__(
        self, messages: Iterable[Message], rows: Iterable[Any], seen: Iterable[bytes]
    ) -> Writes:
        """The rows of `messages`, given the rows of the sagas and the ids in the inbox."""
        instances = {instance.key: instance for instance in map(loaded, rows)}
        before = {key: instance.version for key, instance in instances.items()}
        known, now, writes = set(seen), self.now, self.writes
        for message in messages:
            if message.id in known:
                continue
            known.add(message.id)
            instance = instances.get(message.saga_key)
            if instance is None:
                data: Any = (
                    Shelf(message.body.shelf)
                    if message.saga_type == "Shelf"
                    else Data(message.body.import_id)
                )
                instance = Instance(message.saga_type, message.saga_key, data, now)
                instance.ledger.correlation_id = message.fields.get(
                    b"correlationid", message.id
                ).decode()
                instances[message.saga_key] = instance
            writes.inbox.append((instance.type.encode(), message.id))
            self._step(instance, message)
        for key in sorted(instances):
            self._save(instances[key], before.get(key))
        writes.inbox.sort()
        return writes

    def _step(self, instance: Instance, message: Message) -> None:
        state, self.message, self.sent = instance.state, message, []
        handler = HANDLERS[state, message.type]
        handler(self, instance, message.body)
        instance.version += 1
        instance.ledger.steps += 1
        effects: dict[str, Any] = {}
        if self.sent:
            effects["sent"] = self.sent
        if message.type == b"sagacity.CommandFailed":
            effects["reason"] = instance.ledger.compensation["reason"]
        self.writes.transitions.append(
            (
                instance.uid.encode(),
                instance.version,
                instance.type,
                instance.key,
                message.id,
                message.type.decode(),
                handler.__name__,
                state,
                instance.state,
                instance.status,
                instance.ledger.correlation_id.encode(),
                _json(effects),
                _pack(message.fields),
            )
        )

    def _save(self, instance: Instance, before: int | None) -> None:
        key = instance.key
        row = (
            instance.uid.encode(),
            instance.version,
            instance.status,
            instance.state,
            _json(instance.data),
            _pack(instance.ledger),
            instance.started,
        )
        if before is None:
            self.writes.inserts.append((instance.type, key, *row))
        elif before != instance.version:
            self.writes.updates.append((instance.type, key, before, *row))

    # -------------------------------------------------------------------------------------- sending

    def send(self, instance: Instance, name: str, topic: str, body: bytes, undo: str = "") -> None:
        """A command; `undo` names the one that takes it back."""
        ledger = instance.ledger
        number = ledger.sequence[topic] = ledger.sequence.get(topic, 0) + 1
        id_ = self._put(instance, name, topic, body, "command", sequence=number)
        if undo:
            taking_back = b'{"import_id":%s}' % _json(instance.data.import_id)
            ledger.undo.append(Undo(id_, name, topic, undo, 1, taking_back))

    def undo(self, instance: Instance) -> None:
        """The next command of a compensation, the newest first; the end where there is none."""
        for one in reversed(instance.ledger.undo):
            if not one.confirmed:
                self._put(
                    instance, one.undo_type, one.topic, one.undo_body, "undo", undoes=one.command_id
                )
                return
        instance.status = "compensated"

    def put_event(self, instance: Instance, name: str, topic: str, body: bytes) -> None:
        """An event of the saga."""
        self._put(instance, name, topic, body, "event")

    def _put(
        self,
        instance: Instance,
        name: str,
        topic: str,
        body: bytes,
        kind: str,
        sequence: int = 0,
        undoes: str = "",
    ) -> str:
        uid, key, cause = instance.uid.encode(), instance.key, self.message.id
        correlation = instance.ledger.correlation_id
        seed = b"%s:%d:%d" % (uid, instance.version, len(self.sent))
        id_ = blake2b(seed, digest_size=16).hexdigest()
        headers = Headers(id_, name, topic, "event", self.now, "imports", correlation)
        headers.causation_id, headers.hops = cause.decode(), 1
        fields: Row = (
            *("XADD", f"{self.prefix}:{topic}", "*", "specversion", "1.0", "id", id_),
            *("type", name, "time", self.time, "source", "imports"),
            *("correlationid", correlation, "causationid", cause, "hops", "1"),
        )
        if kind != "event":
            headers.kind, headers.saga_type, headers.saga_key = (
                "command",
                "ImportUser",
                key.decode(),
            )
            headers.saga_uid, headers.reply_to = instance.uid, "imports.replies"
            headers.reply_topics = ("imports", "items")
            headers.sequence, headers.undoes = sequence, undoes
            which = ("undoes", undoes) if undoes else ("sequence", str(sequence))
            fields = (
                *fields,
                *("kind", "command", "sagatype", "ImportUser", "sagakey", key, "sagauid", uid),
                *("replyto", "imports.replies", "replytopics", "imports,items", *which),
            )
        self.writes.outbox.append((id_.encode(), name, topic, uid, _json(headers), body))
        self.writes.commands.append((*fields, "data", body))
        self.sent.append((name, id_, kind))
        return id_


# ----------------------------------------------------------------------------------------- handlers


def begin(batch: Batch, saga: Instance, body: Body) -> None:
    saga.data = data = Data(body.import_id, body.document, body.last_step_fails)
    saga.state = "authenticating"
    undo = "bench.RevokeUser" if data.last_step_fails else ""
    batch.send(saga, "bench.AuthenticateUser", "auth", _document(data), undo)


def authenticated(batch: Batch, saga: Instance, body: Body) -> None:
    del body
    saga.state = "generating"
    undo = "bench.CloseAccount" if saga.data.last_step_fails else ""
    batch.send(saga, "bench.GenerateAccount", "accounts", _document(saga.data), undo)


def generated(batch: Batch, saga: Instance, body: Body) -> None:
    if saga.data.last_step_fails:
        saga.state = "welcoming"
        only = b'{"import_id":%s}' % _json(body.import_id)
        batch.send(saga, "bench.WelcomeUser", "mail", only)
    else:
        saga.state, saga.status = "done", "completed"


def not_welcome(batch: Batch, saga: Instance, body: Body) -> None:
    del body
    saga.state, saga.status = "refused", "compensating"
    saga.ledger.compensation = {"reason": "the user cannot be welcomed"}
    batch.undo(saga)


def undone(batch: Batch, saga: Instance, body: Body) -> None:
    del body
    next(one for one in reversed(saga.ledger.undo) if not one.confirmed).confirmed = True
    batch.undo(saga)


def counted(batch: Batch, saga: Instance, body: Body) -> None:
    saga.state = "counting"
    saga.data.items += 1
    if body.item % 3:
        missing = b'{"item":%d,"document":%s}' % (body.item, _json(body.document))
        batch.put_event(saga, "bench.ItemMissing", "missing", missing)


def _document(data: Data) -> bytes:
    return b'{"import_id":%s,"document":%s}' % (_json(data.import_id), _json(data.document))


HANDLERS: dict[tuple[str, bytes], Callable[[Batch, Instance, Body], None]] = {
    ("", b"bench.ImportRequested"): begin,
    ("authenticating", b"bench.UserAuthenticated"): authenticated,
    ("generating", b"bench.AccountGenerated"): generated,
    ("welcoming", b"sagacity.CommandFailed"): not_welcome,
    ("refused", b"sagacity.CommandDone"): undone,
    ("", b"bench.ItemCounted"): counted,
    ("counting", b"bench.ItemCounted"): counted,
}
"""(state, type of message) -> what to do."""
