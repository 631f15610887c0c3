"""Where a message goes: which sagas it concerns, and how their instances are found. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from sagacity.core.decide import Sender, timeout_envelope
from sagacity.core.definition import Definition
from sagacity.core.delivery import Envelope, spread
from sagacity.core.messages import Message
from sagacity.core.plan import Arrival, ParkedRow, Source

Decode = Callable[[Envelope], Message]
"""Gives the message of an envelope, a fresh one with each call. Raises DecodeError."""


class Retry(msgspec.Struct, frozen=True):
    """When a message that failed, or found no instance, is tried again; times in microseconds."""

    attempts_max: int = 8
    base_us: int = 500_000
    cap_us: int = 300_000_000
    missing_us: int = 60_000_000
    """How long a message waits for an instance to appear before it becomes a dead letter."""

    def due_at(self, now: int, attempts: int, *key: str) -> int:
        """When attempt number `attempts` + 1 is due.

        The first gap is between half of `base_us` and `base_us`; both bounds double with each
        attempt up to the cap. So gaps always grow, and messages that failed together spread out.
        """
        low = min(self.cap_us // 2, self.base_us // 2 << min(max(attempts - 1, 0), 40))
        return now + low + int(low * spread(*key, str(attempts)))


class Catalog(msgspec.Struct, frozen=True):
    """What the sagas of one service are, and how they speak."""

    definitions: dict[str, Definition]
    """Saga type -> definition."""
    decode: Decode
    sender: Sender
    retry: Retry = Retry()


class Routed(msgspec.Struct, frozen=True):
    """Where one message goes for one saga type."""

    definition: Definition
    keys: tuple[str, ...]
    """Instances named by the message itself."""
    lookup: tuple[str, str] | None
    """Or the further key, name and value, that the store must be asked for."""
    missing: str
    waits_for: str


def route(catalog: Catalog, envelope: Envelope, only: str = "") -> list[Routed]:
    """The saga types that a message concerns, and how to find their instances.

    A reply names its instance in the header; any other event is looked up by the key that the saga
    declares for it. A command is for a participant, though its header names the saga that sent it
    and whose service may listen to the same topic. With `only`, just that saga type is looked at.
    Raises DecodeError.
    """
    if envelope.sequence or envelope.undoes:
        return []
    addressed = catalog.definitions.get(envelope.saga_type)
    found: list[Routed] = []
    for saga_type, definition in catalog.definitions.items():
        if only and saga_type != only:
            continue
        event_route = definition.routes.get(envelope.type)
        if definition is addressed and envelope.saga_key:
            missing = event_route.missing if event_route and event_route.starts else "ignore"
            found.append(Routed(definition, (envelope.saga_key,), None, missing, ""))
        elif event_route is not None:
            keys = event_route.keys(catalog.decode(envelope))
            if event_route.key_name:
                for value in keys:
                    name = event_route.key_name
                    found.append(
                        Routed(
                            definition, (), (name, value), event_route.missing, f"{name}={value}"
                        )
                    )
            elif keys:
                waits_for = f"{definition.key_field}={keys[0]}"
                found.append(Routed(definition, keys, None, event_route.missing, waits_for))
    return found


def arrivals_of(
    routed: Routed,
    keys: Sequence[str],
    envelope: Envelope,
    *,
    source: Source = Source.BUS,
    row: ParkedRow | None = None,
) -> list[Arrival]:
    """The arrivals of one message at the instances `keys` of one saga type.

    Where the message may reach several instances the inbox key names the instance too.
    """
    saga_type = routed.definition.saga_type
    looked_up = routed.lookup is not None
    if row is not None and row.saga_key:
        keys = (row.saga_key,)  # it was parked for this one; the others had their own rows
    fans_out = looked_up or len(routed.keys) > 1
    made: list[Arrival] = []
    for key in keys or ("",):
        own = f"{saga_type}#{key}" if fans_out and key else saga_type
        waits_for = routed.waits_for
        if len(routed.keys) > 1:
            waits_for = f"{routed.definition.key_field}={key}"
        made.append(
            Arrival(
                envelope=envelope,
                consumer=own if row is None else row.consumer,
                saga_type=saga_type,
                saga_key=key,
                parks_as=row.consumer if row is not None and not (looked_up and key) else own,
                waits_for=waits_for,
                missing=routed.missing,
                source=source,
                attempts=row.attempts if row is not None else 0,
                parked_at=row.parked_at if row is not None else 0,
                by=routed.lookup,
            )
        )
    return made


def timeout_arrival(
    *, uid: str, name: str, generation: int, due_at: int, saga_type: str, saga_key: str
) -> Arrival:
    """The arrival of a due timeout at its instance."""
    envelope = timeout_envelope(
        uid=uid,
        name=name,
        generation=generation,
        due_at=due_at,
        saga_type=saga_type,
        saga_key=saga_key,
    )
    return Arrival(
        envelope=envelope,
        consumer=saga_type,
        saga_type=saga_type,
        saga_key=saga_key,
        source=Source.TIMEOUT,
    )
