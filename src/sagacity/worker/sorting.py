"""What is to be done with each input of a batch: found once, before any transaction. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import msgspec

from sagacity.codec import encode_envelope
from sagacity.core.delivery import Delivery, Envelope, derived_id
from sagacity.core.errors import DecodeError
from sagacity.core.plan import Arrival, DeadLetterRow, ParkedRow, Source
from sagacity.core.routing import Catalog, Routed, arrivals_of, route, timeout_arrival
from sagacity.ports import Due, DueTimeout, Lookup
from sagacity.service import Service

FAULTS = frozenset({"lost", "oversized", "undecodable"})
"""Reasons why an entry of the bus is no message."""

Input = Delivery | DueTimeout | ParkedRow
"""What a batch is made of: stream entries, due timeouts, and parked messages that are due."""


class Sorted(msgspec.Struct):
    """One input, and where it goes."""

    input: Input
    routed: Sequence[Routed] = ()
    """The sagas it concerns."""
    work: bool = False
    """True where participants must work on it."""
    fault: tuple[str, str] | None = None
    """Reason and error of the dead letter it is, instead of a message."""
    tries: int = 0
    """Batches in which another worker held its instance."""

    @property
    def envelope(self) -> Envelope | None:
        """Its message, where it has one."""
        return None if isinstance(self.input, DueTimeout) else self.input.envelope

    @property
    def message_id(self) -> str:
        """Its message's id; of an entry that is no message, its place on the bus."""
        if isinstance(self.input, DueTimeout):
            return _timeout_arrival(self.input).envelope.id
        envelope = self.input.envelope
        if envelope is not None:
            return envelope.id
        assert isinstance(self.input, Delivery)
        return f"{self.input.topic}/{self.input.entry_id}"

    @property
    def touches(self) -> frozenset[Hashable] | None:
        """What two batches at the same time must not share: instances, and messages for participants.

        None where only the database knows which instances these are.
        """
        places: list[Hashable] = []
        for routed in self.routed:
            if routed.lookup is not None or not routed.keys:
                return None
            places += [(routed.definition.saga_type, key) for key in routed.keys]
        if self.work or self.fault is not None:
            places.append(self.message_id)
        elif not places and isinstance(self.input, DueTimeout):
            places.append((self.input.saga_type, self.input.saga_key))
        return frozenset(places)


def sorted_input(service: Service, catalog: Catalog, one: Input) -> Sorted:
    """Decodes what must be decoded to know where an input goes. Raises nothing."""
    if not isinstance(one, Delivery):  # asked first: no for an answer takes long, see `decide`
        if isinstance(one, DueTimeout):
            return Sorted(one)
        return Sorted(one, routed=_routed_row(catalog, one))
    envelope = one.envelope
    if envelope is None:
        # A bus begins a fault with the reason: "oversized: ...", "lost: ...".
        reason = one.fault.partition(":")[0]
        return Sorted(one, fault=(reason if reason in FAULTS else "undecodable", one.fault))
    if one.fault:
        return Sorted(one, fault=("killer", one.fault))
    try:
        routed = route(catalog, envelope)
    except DecodeError as error:
        return Sorted(one, fault=("mistyped", str(error)))
    if service.works_on(envelope.type):
        return Sorted(one, routed=routed, work=True)
    if service.is_lost_command(envelope):
        text = (
            f"command {envelope.type} is not handled by service {service.name}; expected one of "
            f"{', '.join(sorted(service.commands))}; a command's topic is the address of one service"
        )
        return Sorted(one, routed=routed, fault=("unknown-type", text))
    return Sorted(one, routed=routed)


def behind(held: Iterable[Sorted], inputs: Iterable[Sorted]) -> tuple[list[Sorted], list[Sorted]]:
    """Of `inputs`, what must wait for what another worker holds, and the rest.

    What is looked up in the database may concern any instance.
    """
    places: set[Hashable] = set()
    unknown = False
    for one in held:
        unknown = unknown or one.touches is None
        places.update(one.touches or ())
    if not places and not unknown:
        return [], list(inputs)
    waiting: list[Sorted] = []
    rest: list[Sorted] = []
    for one in inputs:
        touches = one.touches
        if unknown or touches is None or not touches.isdisjoint(places):
            places.update(touches or ())
            unknown = unknown or touches is None
            waiting.append(one)
        else:
            rest.append(one)
    return waiting, rest


def _routed_row(catalog: Catalog, row: ParkedRow) -> Sequence[Routed]:
    """A parked row belongs to one instance; only that one may see it again, unless none was found."""
    replayed = row.reason == "retry" and bool(row.lane)  # a dead letter that found no instance
    again: list[Routed] = []
    if row.reason == "missing" or (replayed and not row.saga_key):
        try:
            again = route(catalog, row.envelope, row.saga_type)
        except DecodeError:
            again = []  # `plan_batch` makes it a dead letter, under the guard of its row
    return again or [
        Routed(
            catalog.definitions[row.saga_type],
            (row.saga_key,) if row.saga_key else (),
            None,
            "dead-letter" if replayed else "ignore",
            row.lane,
        )
    ]


class Batch:
    """Sorted inputs put together for one transaction; pure."""

    def __init__(
        self, service: Service, inputs: Sequence[Sorted], refused: Mapping[str, str]
    ) -> None:
        self.service = service
        self.routed: list[tuple[int, Routed, Envelope, ParkedRow | None]] = []
        self.numbered: list[tuple[int, Delivery]] = []
        self.numbered_timeouts: list[tuple[int, DueTimeout]] = []
        self.parked: list[ParkedRow] = []
        self.for_participants: list[Envelope] = []
        self.faults: list[tuple[Delivery, str, str]] = []
        self.index_of: list[int] = []
        """Of each arrival, the place of its input."""
        places: set[object] = set()
        for index, one in enumerate(inputs):
            if isinstance(one.input, Delivery):
                self.numbered.append((index, one.input))
                self._add(index, one, one.input, refused)
                continue
            place = _place(one.input)
            if place in places:
                continue  # one that was busy, and was found due once more
            places.add(place)
            if isinstance(one.input, DueTimeout):
                self.numbered_timeouts.append((index, one.input))
                continue
            self.parked.append(one.input)
            for routed in one.routed:
                self.routed.append((index, routed, one.input.envelope, one.input))

    def _add(self, index: int, one: Sorted, delivery: Delivery, refused: Mapping[str, str]) -> None:
        if one.fault is not None:
            self.faults.append((delivery, *one.fault))
        envelope = delivery.envelope
        if envelope is None:
            return
        for routed in one.routed:
            self.routed.append((index, routed, envelope, None))
        if one.work and envelope.id in refused:
            self.faults.append((delivery, "refused", refused[envelope.id]))
        elif one.work:
            self.for_participants.append(envelope)

    @property
    def deliveries(self) -> list[Delivery]:
        """Its stream entries."""
        return [delivery for _, delivery in self.numbered]

    @property
    def timeouts(self) -> list[DueTimeout]:
        """Its due timeouts."""
        return [timeout for _, timeout in self.numbered_timeouts]

    @property
    def lookups(self) -> set[Lookup]:
        """The further keys that the store must be asked for."""
        return {
            Lookup(routed.definition.saga_type, *routed.lookup)
            for _, routed, _, _ in self.routed
            if routed.lookup is not None
        }

    @property
    def nothing_to_write(self) -> bool:
        """True where no part of it concerns this service."""
        return not (
            self.routed
            or self.numbered_timeouts
            or self.for_participants
            or self.faults
            or self.parked
        )

    def arrivals(self, found: Mapping[Lookup, tuple[str, ...]]) -> list[Arrival]:
        """What arrives at which instance; `found` says which ones have the keys looked up."""
        arrivals: list[Arrival] = []
        for index, routed, envelope, row in self.routed:
            keys: Sequence[str] = routed.keys
            if routed.lookup is not None:
                lookup = Lookup(routed.definition.saga_type, *routed.lookup)
                keys = found.get(lookup, ())
                if not keys and lookup in found:
                    # Everybody who had this key is finished: late, so nothing to wait for.
                    routed = msgspec.structs.replace(routed, missing="ignore")  # noqa: PLW2901
            source = Source.BUS if row is None else Source.PARKED
            arrivals += arrivals_of(routed, keys, envelope, source=source, row=row)
            self.index_of += [index] * (len(arrivals) - len(self.index_of))
        for index, timeout in self.numbered_timeouts:
            arrivals.append(_timeout_arrival(timeout))
            self.index_of.append(index)
        return arrivals

    def dead_letters(self, now: int) -> list[DeadLetterRow]:
        """The rows of its faults, one for each message."""
        rows: dict[str, DeadLetterRow] = {}
        for delivery, reason, text in self.faults:
            envelope = delivery.envelope
            message_id = (
                envelope.id
                if envelope is not None
                else derived_id(self.service.name, delivery.topic, delivery.entry_id)
            )
            rows[message_id] = DeadLetterRow(
                consumer=self.service.name if reason == "unknown-type" else f"{self.service.name}!",
                message_id=message_id,
                topic=delivery.topic,
                message_type=envelope.type if envelope is not None else "",
                reason=reason,
                error=text,
                attempts=delivery.attempt,
                entry=delivery.raw if envelope is None else encode_envelope(envelope),
                decoded=envelope is not None,
                at=now,
            )
        return list(rows.values())


def _timeout_arrival(timeout: DueTimeout) -> Arrival:
    return timeout_arrival(
        uid=timeout.uid,
        name=timeout.name,
        generation=timeout.generation,
        due_at=timeout.due_at,
        saga_type=timeout.saga_type,
        saga_key=timeout.saga_key,
    )


def _place(one: DueTimeout | ParkedRow) -> object:
    """The row that an input comes from."""
    if isinstance(one, ParkedRow):
        return "parked", one.consumer, one.message_id
    return "timeout", one.uid, one.name, one.generation


def due_inputs(due: Due) -> list[Input]:
    """What the clock brought up, as inputs of a batch: parked messages first, they are older."""
    return [*due.parked, *due.timeouts]
