"""I8 to I14: what the framework promises, seen from the outside."""

import importlib
import time
from itertools import pairwise

import msgspec
from sqlalchemy import func, inspect, select

from examples.batch_import.checking.evidence import Found
from examples.batch_import.checking.invariant import invariant
from examples.batch_import.contexts import tables_of
from sagacity import Service
from sagacity.backends.sql.rows import instance_of, transition_of
from sagacity.backends.sql.tables import (
    PREFIX,
    inbox,
    outbox,
    outbox_pending,
    saga,
    transition,
)
from sagacity.core.decide import CONTROL, replay
from sagacity.core.delivery import decode_entry
from sagacity.core.instance import Instance, Status, decode_ledger
from sagacity.core.messages import message_type
from sagacity.core.plan import TransitionRow

ROOTS = frozenset({"importing.ReceiveBatch", "authentication.ConfirmEmail"})
"""What comes from outside: a file was handed in, somebody pressed the button."""


def service_named(name: str) -> Service:
    """The declaration of a service: its sagas and messages."""
    service = importlib.import_module(f"examples.batch_import.{name}.service").service
    assert isinstance(service, Service)
    return service


@invariant("I8", "every message has left, or is younger than the lag that is allowed")
async def messages_leave(found: Found) -> list[str]:
    oldest = time.time_ns() // 1000 - int(found.evidence.lag_s * 1e6)
    wrong: list[str] = []
    for service in found.evidence.stores:
        [row] = await found.rows(
            service,
            select(func.count(), func.min(outbox_pending.c.created_at)).where(
                outbox_pending.c.created_at < oldest
            ),
        )
        if row[0]:
            age = (time.time_ns() // 1000 - row[1]) / 1e6
            wrong.append(
                f"{service} has not published {row[0]} messages, the oldest for {age:.0f} s"
            )
    return wrong


@invariant(
    "I9", "every saga has ended, or waits for a timeout or an answer, or is reported as held"
)
async def sagas_go_on(found: Found) -> list[str]:
    wrong: list[str] = []
    for service in found.evidence.stores:
        ended = (Status.COMPLETED.value, Status.COMPENSATED.value)
        for row in await found.rows(
            service,
            select(saga.c.saga_type, saga.c.saga_key, saga.c.state, saga.c.status, saga.c.ledger)
            .where(saga.c.status.not_in(ended))
            .order_by(saga.c.saga_type, saga.c.saga_key),
        ):
            ledger = decode_ledger(row.ledger)
            held = row.status == Status.STUCK or ledger.parked
            if not (ledger.timeouts or ledger.pending or held):
                name = f"{row.saga_type} {row.saga_key.decode()}"
                wrong.append(f"{name} is {row.status} in {row.state} and waits for nothing")
    return wrong


class _Header(msgspec.Struct):
    id: str
    type: str
    correlation_id: str = ""
    causation_id: str = ""


@invariant("I10", "every message follows from one batch or one confirmation")
async def messages_have_an_origin(found: Found) -> list[str]:
    decoder = msgspec.json.Decoder(_Header)
    headers = {
        service: [
            decoder.decode(header)
            for (header,) in await found.rows(service, select(outbox.c.headers))
        ]
        for service in found.evidence.stores
    }
    operators = {message_type(cls).name for cls in CONTROL}
    roots = {
        header.id
        for of_one in headers.values()
        for header in of_one
        if header.type in ROOTS and not header.causation_id
    }
    return [
        f"{header.type} {header.id} of {service} says that it follows from "
        f"{header.correlation_id or 'nothing'}"
        for service, of_one in headers.items()
        for header in of_one
        if header.correlation_id not in roots and header.type not in operators
    ]


async def _histories(found: Found, service: str) -> list[tuple[Instance, list[TransitionRow]]]:
    """Every instance with the steps it has taken."""
    rows = await found.rows(
        service,
        select(transition).order_by(transition.c.uid, transition.c.version, transition.c.seq),
    )
    steps: dict[str, list[TransitionRow]] = {}
    for row in rows:
        step = transition_of(row)
        steps.setdefault(step.uid, []).append(step)
    instances = [instance_of(row) for row in await found.rows(service, select(saga))]
    return [(instance, steps.get(instance.uid, [])) for instance in instances]


def _comparable(instance: Instance) -> Instance:
    """Without what changes when a message is only held back."""
    ledger = msgspec.structs.replace(instance.ledger, parked=())
    return msgspec.structs.replace(instance, version=0, ledger=ledger)


@invariant("I11", "replaying the history of a saga gives the state that is stored")
async def histories_replay(found: Found) -> list[str]:
    wrong: list[str] = []
    for name in found.evidence.stores:
        service = service_named(name)
        sender = service.catalog().sender
        for instance, history in await _histories(found, name):
            what = f"{instance.type} {instance.key}"
            try:
                replayed = replay(
                    service.sagas[instance.type],
                    instance.key,
                    [(step.version, step.at, decode_entry(step.entry)) for step in history],
                    service.decode,
                    sender,
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, the history does not replay
                wrong.append(f"{what} does not replay: {type(error).__name__}: {error}")
                continue
            if replayed is None or _comparable(replayed) != _comparable(instance):
                wrong.append(f"{what} is stored {_differing(replayed, instance)}")
    return wrong


def _differing(replayed: Instance | None, stored: Instance) -> str:
    if replayed is None:
        return "without a history"
    pairs = {
        name: (getattr(stored, name), getattr(replayed, name))
        for name in ("state", "status", "data", "uid", "updated_at")
    }
    pairs |= {
        name: (getattr(stored.ledger, name), getattr(replayed.ledger, name))
        for name in stored.ledger.__struct_fields__
        if name != "parked"
    }
    return "; ".join(
        f"with {name} {is_!s:.60}, replayed {should!s:.60}"
        for name, (is_, should) in pairs.items()
        if is_ != should
    )


@invariant("I12", "each database holds the tables of one service only")
async def contexts_are_apart(found: Found) -> list[str]:
    wrong: list[str] = []
    for service, connection in found.connections.items():
        names = await connection.run_sync(lambda plain: inspect(plain).get_table_names())
        own = set(tables_of(service).tables)
        wrong += [
            f"the database of {service} has the table {name}"
            for name in sorted(names)
            if name not in own and not name.startswith(PREFIX)
        ]
        foreign = {
            f"{table.name} refers to {key.target_fullname}"
            for table in tables_of(service).tables.values()
            for key in table.foreign_keys
            if key.target_fullname.partition(".")[0] not in own
        }
        wrong += sorted(foreign)
    return wrong


@invariant("I13", "no consumer has taken the same message twice")
async def nothing_counts_twice(found: Found) -> list[str]:
    twice = (
        select(inbox.c.consumer, inbox.c.message_id, func.count())
        .group_by(inbox.c.consumer, inbox.c.message_id)
        .having(func.count() > 1)
    )
    return [
        f"{consumer.decode()} of {service} has message {message_id.decode()} {count} times"
        for service in found.evidence.stores
        for consumer, message_id, count in await found.rows(service, twice)
    ]


class _Sent(msgspec.Struct):
    id: str
    undoes: str = ""
    causation_id: str = ""
    sequence: int = 0


@invariant(
    "I14", "what was done is undone in reverse order, each after the one before it is confirmed"
)
async def undone_in_reverse(found: Found) -> list[str]:
    decoder = msgspec.json.Decoder(_Sent)
    wrong: list[str] = []
    for name in found.evidence.stores:
        parallel = {d.saga_type for d in service_named(name).definitions if d.parallel}
        compensated = {
            instance.uid: (instance, history)
            for instance, history in await _histories(found, name)
            if instance.ledger.compensation is not None and instance.type not in parallel
        }
        sent: dict[str, list[_Sent]] = {}
        rows = select(outbox.c.lane, outbox.c.headers).order_by(outbox.c.seq)
        for lane, headers in await found.rows(name, rows):
            if lane.decode() in compensated:
                sent.setdefault(lane.decode(), []).append(decoder.decode(headers))
        for uid, (instance, history) in compensated.items():
            what = f"{instance.type} {instance.key}"
            answered = {step.message_id: decode_entry(step.entry).in_reply_to for step in history}
            wrong += [f"{what} {text}" for text in _disorder(sent.get(uid, []), answered)]
    return wrong


def _disorder(sent: list[_Sent], answered: dict[str, str]) -> list[str]:
    """What is wrong with the order in which an instance sent its commands and their undoing.

    `answered` maps the id of each message it handled to the command that the message answers.
    """
    place = {one.id: number for number, one in enumerate(sent) if not one.undoes}
    undos = [one for one in sent if one.undoes]
    wrong: list[str] = []
    for before, after in pairwise(undos):
        if before.undoes == after.undoes:
            continue  # tried again by an operator
        if place[before.undoes] < place[after.undoes]:
            wrong.append(f"undid command {before.undoes} before the later {after.undoes}")
        elif answered.get(after.causation_id, before.id) not in {before.id, ""}:
            wrong.append(f"sent the undo {after.id} before the answer to {before.id}")
    return wrong
