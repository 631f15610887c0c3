"""One batch: read what concerns it, fold `decide` over it, commit, publish, acknowledge.

The order is the whole point: nothing leaves before the commit that recorded it, and nothing is
acknowledged before the commit that took responsibility for it (``protocol.md`` 2.3).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import anyio
import msgspec

from sagacity.core.batch import plan_batch
from sagacity.core.delivery import Delivery, derived_id
from sagacity.core.errors import BusError, Conflict, DataRefused, KeyTaken
from sagacity.core.plan import DeadLetterRow, InboxRow, Outcome, ParkedRow, Plan
from sagacity.core.routing import Catalog
from sagacity.ports import Bus, Lookup, Observer, OutboxStore, PendingRow, Store
from sagacity.service import Service
from sagacity.worker.sorting import Batch, Input, Sorted, behind, sorted_input

log = logging.getLogger(__name__)

CONFLICTS_MAX = 5
"""Reruns after a conflict before the batch is halved; a conflict is no attempt of any message."""


class BatchStore(Store, OutboxStore, Protocol):
    """What batches need of a store."""


class Settled(msgspec.Struct):
    """How a batch ended."""

    done: list[Delivery]
    """Deliveries that may be acknowledged."""
    busy: list[Sorted]
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
        store: BatchStore,
        bus: Bus,
        *,
        observer: Observer | None = None,
        payload_bytes_max: int = 262_144,
    ) -> None:
        self.service, self.catalog, self.store, self.bus = service, catalog, store, bus
        self.observer, self.payload_bytes_max = observer, payload_bytes_max
        self.waiting = True
        """True while messages may be parked for instances that do not exist."""
        self.missed = 0
        """Messages parked here for instances that did not exist."""
        self.published_to: set[str] = set()
        """Topics that this process has published to."""
        self.published: list[int] = []
        """Pending rows that left; forgotten in the next batch's transaction."""
        self._gone: set[int] = set()
        """Pending rows that left and may still be there; a batch that finds one lets it be."""
        self._losses = 0
        """How often the bus has lost what had left."""

    def sort(self, one: Input) -> Sorted:
        """What is to be done with an input; pure, and good for every try."""
        return sorted_input(self.service, self.catalog, one)

    async def settle(self, inputs: Sequence[Input | Sorted], *, wait: bool = False) -> Settled:
        """Commits a batch. Raises Unavailable: then run the same batch again.

        A batch that the database refuses is halved until the message at fault stands alone; that one
        is parked, or becomes a dead letter. With `wait`, held instances are waited for.
        """
        batch = [one if isinstance(one, Sorted) else self.sort(one) for one in inputs]
        return await self._settle(batch, wait=wait, refused={}, taken={}, conflicts=0)

    async def _settle(
        self,
        inputs: list[Sorted],
        *,
        wait: bool,
        refused: Mapping[str, str],
        taken: Mapping[tuple[str, str, str], str],
        conflicts: int,
    ) -> Settled:
        try:
            # Whoever has lost a race takes locks, so that it is not lost for ever.
            optimistic = not wait and conflicts == 0
            return await self._attempt(
                inputs, wait=wait, optimistic=optimistic, refused=refused, taken=taken
            )
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
            message_id = inputs[0].message_id
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
        self, inputs: list[Sorted], *, wait: bool, taken: Mapping[tuple[str, str, str], str]
    ) -> Settled:
        middle = len(inputs) // 2
        first = await self._settle(inputs[:middle], wait=wait, refused={}, taken=taken, conflicts=0)
        # The second half may need what the first one's rows say, and does not pass what was held.
        held, rest = behind(first.busy, inputs[middle:])
        second = await self._settle(rest, wait=wait, refused={}, taken=taken, conflicts=0)
        later = set(map(id, (*held, *second.busy)))
        # Of a lane that both wrote to, the second one found the rows of the first one too.
        pending = {row.seq: row for row in (*first.pending, *second.pending)}
        outcomes = dict(first.outcomes)
        for outcome, count in second.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
        return Settled(
            done=first.done + second.done,
            busy=first.busy + [one for one in inputs if id(one) in later],
            pending=[pending[seq] for seq in sorted(pending)],
            work=first.work or second.work,
            due=first.due or second.due,
            outcomes=outcomes,
        )

    async def _attempt(
        self,
        inputs: list[Sorted],
        *,
        wait: bool,
        optimistic: bool,
        refused: Mapping[str, str],
        taken: Mapping[tuple[str, str, str], str],
    ) -> Settled:
        batch = Batch(self.service, inputs, refused)
        # Noted now: a batch that ends meanwhile may forget rows that this one still finds pending.
        gone = frozenset(self._gone)
        losses = self._losses
        # Whoever takes them forgets them; two batches at the same time do not both.
        published, self.published = self.published, []
        if batch.nothing_to_write and not published:
            return Settled(batch.deliveries, [], [], work=False, due=False, outcomes={})
        try:
            async with self.store.transaction(optimistic=optimistic) as transaction:
                now = transaction.now
                found: Mapping[Lookup, tuple[str, ...]] = {}
                if lookups := batch.lookups:
                    found = await transaction.correlated(lookups)
                arrivals = batch.arrivals(found)
                wanted: dict[str, set[str]] = {}
                for arrival in arrivals:
                    if arrival.saga_key:
                        wanted.setdefault(arrival.saga_type, set()).add(arrival.saga_key)
                work = [
                    row for e in batch.for_participants for row in self.service.work_rows(e, now)
                ]
                dead = batch.dead_letters(now)
                loaded, known = await transaction.read(
                    wanted,
                    inbox={
                        *(guard for arrival in arrivals for guard in arrival.guards),
                        *((row.consumer, row.message_id) for row in work),
                        *((row.consumer, row.message_id) for row in dead),
                    },
                    timeouts={(t.uid, t.name, t.generation) for t in batch.timeouts},
                    parked={(row.consumer, row.message_id) for row in batch.parked},
                    wait=wait,
                )
                plan, outcomes = plan_batch(
                    self.catalog, arrivals, loaded, known, now, refused=refused, taken=taken
                )
                has_work = _take_over(plan, work, dead, known.seen)
                busy = {
                    batch.index_of[place]
                    for place, outcome in enumerate(outcomes)
                    if outcome is Outcome.BUSY
                }
                pending: list[PendingRow] = []
                if losses != self._losses:
                    published = []  # the relay sends them again
                if published or not plan.empty:
                    pending = await transaction.write(plan, published)
        except BaseException:
            if losses == self._losses:
                self.published = published + self.published
            raise
        if losses == self._losses:
            pending = [row for row in pending if row.seq not in gone]
            self._gone.difference_update(published)
        missed = sum(row.reason == "missing" for row in plan.parked)
        self.missed += missed
        self.waiting = self.waiting or missed > 0
        counts: dict[Outcome, int] = {}
        for outcome in outcomes:
            counts[outcome] = counts.get(outcome, 0) + 1
        _tell(plan)
        expanded = len(arrivals) - len(batch.routed)
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
        seqs = [row.seq for row in pending]
        self.published += seqs
        self._gone.update(seqs)
        self.published_to.update(row.envelope.topic for row in pending)
        return True

    async def forget_published(self) -> None:
        """Forgets what was published since the last batch. Raises StoreError: then call it again."""
        seqs, self.published = self.published, []
        if not seqs:
            return
        losses = self._losses
        try:
            await self.store.published(seqs)
        except BaseException:
            if losses == self._losses:
                self.published = seqs + self.published
            raise
        if losses == self._losses:
            self._gone.difference_update(seqs)

    def lost(self) -> None:
        """The bus may have lost what left: what is not forgotten yet stays pending, for the relay."""
        self._losses += 1
        self.published = []
        self._gone.clear()

    def _notice(self, name: str, **attributes: object) -> None:
        if self.observer is not None:
            self.observer.notice(name, attributes)


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


def _tell(plan: Plan) -> None:
    """Says which messages failed."""
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


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
