"""One batch: read what concerns it under locks, fold `decide` over it, commit, publish, acknowledge.

The order is the whole point: nothing leaves before the commit that recorded it, and nothing is
acknowledged before the commit that took responsibility for it (``protocol.md`` 2.3).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

import anyio
import msgspec

from sagacity.codec import encode_envelope
from sagacity.core.batch import plan_batch
from sagacity.core.decide import timeout_envelope
from sagacity.core.delivery import Delivery, Envelope, derived_id
from sagacity.core.errors import BusError, Conflict, DataRefused, DecodeError, KeyTaken
from sagacity.core.plan import (
    Arrival,
    DeadLetterRow,
    InboxRow,
    Outcome,
    ParkedRow,
    Plan,
    Source,
)
from sagacity.core.routing import (
    Catalog,
    Routed,
    arrivals_of,
    route,
    timeout_arrival,
)
from sagacity.ports import Bus, Due, DueTimeout, Lookup, Observer, PendingRow, Store, Transaction
from sagacity.service import Service

log = logging.getLogger(__name__)

CONFLICTS_MAX = 5
"""Reruns after a conflict before the batch is halved; a conflict is no attempt of any message."""

FAULTS = frozenset({"lost", "oversized", "undecodable"})
"""Reasons why an entry of the bus is no message."""

Input = Delivery | DueTimeout | ParkedRow
"""What a batch is made of: stream entries, due timeouts, and parked messages that are due."""


class Settled(msgspec.Struct):
    """How a batch ended."""

    done: list[Delivery]
    """Deliveries that may be acknowledged."""
    busy: list[Input]
    """Inputs whose instance another worker holds; they come again in a moment."""
    pending: list[PendingRow]
    """What to publish, in order."""
    work: bool
    """True where participants have something new to do."""
    due: bool
    """True where parked messages of sagas, or timeouts, may be due at once."""
    outcomes: dict[Outcome, int]


class Cycle:
    """Runs batches for one service on one store and one bus."""

    def __init__(
        self,
        service: Service,
        catalog: Catalog,
        store: Store,
        bus: Bus,
        *,
        observer: Observer | None = None,
        payload_bytes_max: int = 262_144,
    ) -> None:
        self.service, self.catalog, self.store, self.bus = service, catalog, store, bus
        self.observer, self.payload_bytes_max = observer, payload_bytes_max
        self.waiting = True
        """True while messages may be parked for instances that do not exist."""
        self.published_to: set[str] = set()
        """Topics that this process has published to."""
        self.published: list[int] = []
        """Pending rows that left; forgotten in the next batch's transaction."""

    async def settle(self, inputs: Sequence[Input], *, wait: bool = False) -> Settled:
        """Commits a batch. Raises Unavailable: then run the same batch again.

        A batch that the database refuses is halved until the message at fault stands alone; that one
        is parked, or becomes a dead letter. With `wait`, held instances are waited for.
        """
        return await self._settle(list(inputs), wait=wait, refused={}, taken={}, conflicts=0)

    async def _settle(
        self,
        inputs: list[Input],
        *,
        wait: bool,
        refused: Mapping[str, str],
        taken: Mapping[tuple[str, str, str], str],
        conflicts: int,
    ) -> Settled:
        try:
            return await self._attempt(inputs, wait=wait, refused=refused, taken=taken)
        except KeyTaken as error:
            claim = (error.saga_type, error.name, error.value)
            if claim in taken:
                raise
            return await self._settle(
                inputs,
                wait=wait,
                refused=refused,
                taken={**taken, claim: error.owner},
                conflicts=conflicts,
            )
        except Conflict as error:
            self._notice("batch.conflict", error=str(error))
            if conflicts >= CONFLICTS_MAX and len(inputs) > 1:
                return await self._halves(inputs, wait=wait, taken=taken)
            if conflicts >= 4 * CONFLICTS_MAX:
                raise
            await anyio.sleep(random.uniform(0.001, 0.003 * (conflicts + 1)))
            return await self._settle(
                inputs, wait=wait, refused=refused, taken=taken, conflicts=conflicts + 1
            )
        except DataRefused as error:
            if len(inputs) > 1:
                return await self._halves(inputs, wait=wait, taken=taken)
            message_id = _identity(inputs[0])
            if message_id in refused:
                # Not even its failure can be written. It stays where it is and comes again; whoever
                # came with it goes on.
                log.error(  # noqa: TRY400
                    "Database refuses the failure of a message, it is left",
                    extra={"message_id": message_id, "error": str(error)},
                )
                await anyio.sleep(0.5)
                return Settled([], [], [], work=False, due=False, outcomes={})
            # No traceback: the database's words say it all.
            log.error(  # noqa: TRY400
                "Database refuses a message", extra={"message_id": message_id, "error": str(error)}
            )
            return await self._settle(
                inputs,
                wait=wait,
                refused={message_id: str(error)},
                taken=taken,
                conflicts=conflicts,
            )

    async def _halves(
        self, inputs: list[Input], *, wait: bool, taken: Mapping[tuple[str, str, str], str]
    ) -> Settled:
        middle = len(inputs) // 2
        first = await self._settle(inputs[:middle], wait=wait, refused={}, taken=taken, conflicts=0)
        # The second half may need what the first one's rows say.
        second = await self._settle(
            inputs[middle:], wait=wait, refused={}, taken=taken, conflicts=0
        )
        outcomes = dict(first.outcomes)
        for outcome, count in second.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
        return Settled(
            done=first.done + second.done,
            busy=first.busy + second.busy,
            pending=first.pending + second.pending,
            work=first.work or second.work,
            due=first.due or second.due,
            outcomes=outcomes,
        )

    async def _attempt(
        self,
        inputs: list[Input],
        *,
        wait: bool,
        refused: Mapping[str, str],
        taken: Mapping[tuple[str, str, str], str],
    ) -> Settled:
        batch = _Sorted(self.service, self.catalog, inputs, refused)
        published = list(self.published)
        if batch.nothing_to_write and not published:
            return Settled(batch.deliveries, [], [], work=False, due=False, outcomes={})
        async with self.store.transaction() as transaction:
            now = transaction.now
            arrivals, expanded = await self._arrivals(transaction, batch)
            wanted: dict[str, set[str]] = {}
            for arrival in arrivals:
                if arrival.saga_key:
                    wanted.setdefault(arrival.saga_type, set()).add(arrival.saga_key)
            loaded = await transaction.load(wanted, wait=wait)
            work = [row for e in batch.for_participants for row in self.service.work_rows(e, now)]
            dead = batch.dead_letters(now)
            known = await transaction.known(
                inbox={
                    *(guard for arrival in arrivals for guard in arrival.guards),
                    *((row.consumer, row.message_id) for row in work),
                    *((row.consumer, row.message_id) for row in dead),
                },
                timeouts={(t.uid, t.name, t.generation) for t in batch.timeouts},
                parked={(row.consumer, row.message_id) for row in batch.parked},
            )
            plan, outcomes = plan_batch(
                self.catalog, arrivals, loaded, known, now, refused=refused, taken=taken
            )
            has_work = _take_over(plan, work, dead, known.seen)
            busy = {
                batch.input_of(arrival)
                for arrival, outcome in zip(arrivals, outcomes, strict=True)
                if outcome is Outcome.BUSY
            }
            pending: list[PendingRow] = []
            if published or not plan.empty:
                pending = await transaction.write(plan, published)
        gone = set(published)
        self.published = [seq for seq in self.published if seq not in gone]
        counts: dict[Outcome, int] = {}
        for outcome in outcomes:
            counts[outcome] = counts.get(outcome, 0) + 1
        for row in plan.dead_letters:
            log.error(
                "Message became a dead letter",
                extra={
                    "consumer": row.consumer,
                    "message_id": row.message_id,
                    "type": row.message_type,
                    "reason": row.reason,
                    "error": _last_line(row.error),
                },
            )
        for parked in plan.parked:
            if parked.reason == "retry":
                log.warning(
                    "Handler failed, message is tried again",
                    extra={
                        "consumer": parked.consumer,
                        "message_id": parked.message_id,
                        "type": parked.envelope.type,
                        "attempts": parked.attempts,
                        "error": _last_line(parked.error),
                    },
                )
        self._notice("batch.committed", inputs=len(inputs), expanded=expanded, **counts)
        return Settled(
            done=[d for i, d in batch.numbered if i not in busy],
            busy=[inputs[i] for i in sorted(busy)],
            pending=pending,
            work=has_work,
            due=bool(plan.released)
            or any(timeout.due_at <= now for timeout in plan.timeouts)
            or bool(plan.woken and self.waiting),
            outcomes=counts,
        )

    async def note_try(self, delivery: Delivery, most: int) -> int:
        """Notes that an entry is about to be tried alone; returns how often it was before, up to `most`.

        The note is committed before the try, so it stays where the try ends the process. Raises
        StoreError.
        """
        entry = derived_id(self.service.name, delivery.topic, delivery.entry_id)
        notes = [(f"{self.service.name}?{number}", entry) for number in range(1, most + 1)]
        async with self.store.transaction() as transaction:
            known = await transaction.known(inbox=notes)
            tries = sum(note in known.seen for note in notes)
            if tries < most:
                row = InboxRow(*notes[tries], Outcome.PARKED)
                await transaction.write(Plan(now=transaction.now, inbox=[row]))
        return tries

    async def _arrivals(
        self, transaction: Transaction, batch: _Sorted
    ) -> tuple[list[Arrival], int]:
        """The arrivals of the batch, with the further keys looked up."""
        lookups = {
            Lookup(routed.definition.saga_type, *routed.lookup)
            for _, routed, _, _ in batch.routed
            if routed.lookup is not None
        }
        found: Mapping[Lookup, tuple[str, ...]] = {}
        if lookups:
            found = await transaction.correlated(lookups)
        arrivals: list[Arrival] = []
        for index, routed, envelope, row in batch.routed:
            keys: Sequence[str] = routed.keys
            if routed.lookup is not None:
                lookup = Lookup(routed.definition.saga_type, *routed.lookup)
                keys = found.get(lookup, ())
                if not keys and lookup in found:
                    # Everybody who had this key is finished: late, so nothing to wait for.
                    routed = msgspec.structs.replace(routed, missing="ignore")  # noqa: PLW2901
            source = Source.BUS if row is None else Source.PARKED
            for arrival in arrivals_of(routed, keys, envelope, source=source, row=row):
                arrivals.append(arrival)
                batch.index_of[id(arrival)] = index
        for index, timeout in batch.numbered_timeouts:
            arrival = timeout_arrival(
                uid=timeout.uid,
                name=timeout.name,
                generation=timeout.generation,
                due_at=timeout.due_at,
                saga_type=timeout.saga_type,
                saga_key=timeout.saga_key,
            )
            arrivals.append(arrival)
            batch.index_of[id(arrival)] = index
        return arrivals, len(arrivals) - len(batch.routed)

    async def publish(self, pending: Sequence[PendingRow]) -> bool:
        """Sends committed rows; the ones that left are forgotten with the next commit.

        False where the bus cannot be reached: the relay's sweep sends them later.
        """
        if not pending:
            return True
        try:
            await self.bus.publish([row.envelope for row in pending])
        except BusError as error:
            log.warning(
                "Publishing failed, the relay tries again",
                extra={"messages": len(pending), "error": str(error)},
            )
            return False
        self.published.extend(row.seq for row in pending)
        self.published_to.update(row.envelope.topic for row in pending)
        return True

    def _notice(self, name: str, **attributes: object) -> None:
        if self.observer is not None:
            self.observer.notice(name, attributes)


class _Sorted:
    """A batch sorted by what is to be done with each input; pure."""

    def __init__(
        self, service: Service, catalog: Catalog, inputs: list[Input], refused: Mapping[str, str]
    ) -> None:
        self.service = service
        self.routed: list[tuple[int, Routed, Envelope, ParkedRow | None]] = []
        self.numbered: list[tuple[int, Delivery]] = []
        self.numbered_timeouts: list[tuple[int, DueTimeout]] = []
        self.parked: list[ParkedRow] = []
        self.for_participants: list[Envelope] = []
        self.faults: list[tuple[Delivery, str, str]] = []
        self.index_of: dict[int, int] = {}
        places: set[object] = set()
        for index, one in enumerate(inputs):
            if isinstance(one, Delivery):
                self.numbered.append((index, one))
                self._sort_delivery(catalog, index, one, refused)
                continue
            place = _place(one)
            if place in places:
                continue  # one that was busy, and was found due once more
            places.add(place)
            if isinstance(one, DueTimeout):
                self.numbered_timeouts.append((index, one))
            else:
                self.parked.append(one)
                self._route(catalog, index, one.envelope, one)

    def _sort_delivery(
        self, catalog: Catalog, index: int, delivery: Delivery, refused: Mapping[str, str]
    ) -> None:
        envelope = delivery.envelope
        if envelope is None:
            # A bus begins a fault with the reason: "oversized: ...", "lost: ...".
            reason = delivery.fault.partition(":")[0]
            if reason not in FAULTS:
                reason = "undecodable"
            self.faults.append((delivery, reason, delivery.fault))
            return
        if delivery.fault:
            self.faults.append((delivery, "killer", delivery.fault))
            return
        try:
            self._route(catalog, index, envelope, None)
        except DecodeError as error:
            self.faults.append((delivery, "mistyped", str(error)))
            return
        if any(True for _ in self.service.participants(envelope)):
            if envelope.id in refused:
                self.faults.append((delivery, "refused", refused[envelope.id]))
            else:
                self.for_participants.append(envelope)
        elif self.service.is_lost_command(envelope):
            text = (
                f"command {envelope.type} is not handled by service {self.service.name}; expected one of "
                f"{', '.join(sorted(self.service.commands))}; a command's topic is the address of one service"
            )
            self.faults.append((delivery, "unknown-type", text))

    def _route(
        self, catalog: Catalog, index: int, envelope: Envelope, row: ParkedRow | None
    ) -> None:
        if row is None:
            self.routed.extend(
                (index, routed, envelope, None) for routed in route(catalog, envelope)
            )
            return
        # A parked row belongs to one instance; only that one may see it again, unless none was found.
        replayed = row.reason == "retry" and bool(row.lane)  # a dead letter that found no instance
        pinned = Routed(
            catalog.definitions[row.saga_type],
            (row.saga_key,) if row.saga_key else (),
            None,
            "dead-letter" if replayed else "ignore",
            row.lane,
        )
        again: list[Routed] = []
        if row.reason == "missing" or (replayed and not row.saga_key):
            try:
                again = route(catalog, envelope, row.saga_type)
            except DecodeError:
                again = []  # `plan_batch` makes it a dead letter, under the guard of its row
        self.routed.extend((index, routed, envelope, row) for routed in again or [pinned])

    @property
    def deliveries(self) -> list[Delivery]:
        return [delivery for _, delivery in self.numbered]

    @property
    def timeouts(self) -> list[DueTimeout]:
        return [timeout for _, timeout in self.numbered_timeouts]

    @property
    def nothing_to_write(self) -> bool:
        return not (
            self.routed
            or self.numbered_timeouts
            or self.for_participants
            or self.faults
            or self.parked
        )

    def input_of(self, arrival: Arrival) -> int:
        return self.index_of[id(arrival)]

    def dead_letters(self, now: int) -> list[DeadLetterRow]:
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


def _take_over(
    plan: Plan, work: list[ParkedRow], dead: list[DeadLetterRow], seen: set[tuple[str, str]]
) -> bool:
    """Adds the rows of participants and of faults that this consumer has not seen before."""
    has_work = False
    accepted = set(seen)
    for row in work:
        guard = (row.consumer, row.message_id)
        if guard not in accepted:
            accepted.add(guard)
            plan.parked.append(row)
            plan.inbox.append(InboxRow(*guard, Outcome.PARKED))
            has_work = True
    for letter in dead:
        guard = (letter.consumer, letter.message_id)
        if guard not in accepted:
            accepted.add(guard)
            plan.dead_letters.append(letter)
            plan.inbox.append(InboxRow(*guard, Outcome.DEAD))
    return has_work


def _identity(one: Input) -> str:
    if isinstance(one, Delivery):
        return one.envelope.id if one.envelope is not None else f"{one.topic}/{one.entry_id}"
    if isinstance(one, ParkedRow):
        return one.message_id
    return timeout_envelope(
        uid=one.uid,
        name=one.name,
        generation=one.generation,
        due_at=one.due_at,
        saga_type=one.saga_type,
        saga_key=one.saga_key,
    ).id


def _place(one: DueTimeout | ParkedRow) -> object:
    """The row that an input comes from."""
    if isinstance(one, ParkedRow):
        return "parked", one.consumer, one.message_id
    return "timeout", one.uid, one.name, one.generation


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def due_inputs(due: Due) -> list[Input]:
    """What the clock brought up, as inputs of a batch: parked messages first, they are older."""
    return [*due.parked, *due.timeouts]
