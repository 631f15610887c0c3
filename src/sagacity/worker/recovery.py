"""The loss check: whatever a bus loses is published again from the outbox (``protocol.md`` 3.5).

A bus may be emptied, fall back to an older state when a replica takes over, or lose one topic; none
of that raises an error anywhere. So about once a second the bus is asked whether it is the one of
before (its epoch and identity), and whether it still holds the newest entry that was marked. Where
not, every outbox row after the newest mark that survived becomes pending again, less a margin, and
the relay publishes it. Consumers see copies only, which their inboxes drop.

Nothing here has to happen once only: any number of workers may check, and the first one wins.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Collection, Sequence
from uuid import uuid4

import anyio

from sagacity.core.errors import BusError, Conflict, StoreError
from sagacity.ports import BusMemory, Clock, Lost, Mark, MarkStore, Observer, Witness

log = logging.getLogger(__name__)

__all__ = ["Recovery", "thinned"]

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
_NEVER = sys.maxsize


class Recovery:
    """Compares a bus with what a store remembers of it.

    Args:
        store: Remembers, and holds the outbox.
        bus: The bus that may forget.
        clock: The store's time.
        topics: What the service publishes to, asked again at each round.
        margin_us: Rows this much older than a mark may have been committed after it: at least twice
            the longest transaction.
        mark_every_us: Time between two marks.
        retention_us: Marks older than the outbox are of no use.
        suspected: Called where the bus is another one or lost something, before rows become pending
            again: nothing that left before may be forgotten any more.
        republished: Called with the number of rows that are pending again; wakes the relay.
        observer: Told ``bus.lost`` with topics and rows.
        new_epoch: Makes a value for an empty bus.
    """

    def __init__(
        self,
        store: MarkStore,
        bus: BusMemory,
        clock: Clock,
        topics: Callable[[], Collection[str]],
        *,
        margin_us: int = 80_000_000,
        mark_every_us: int = 10_000_000,
        retention_us: int = 14 * 24 * HOUR_US,
        suspected: Callable[[], None] | None = None,
        republished: Callable[[int], None] | None = None,
        observer: Observer | None = None,
        new_epoch: Callable[[], str] = lambda: uuid4().hex,
    ) -> None:
        self.store, self.bus, self.clock, self.topics = store, bus, clock, topics
        self.margin_us, self.mark_every_us, self.retention_us = (
            margin_us,
            mark_every_us,
            retention_us,
        )
        self.suspected, self.republished = suspected, republished
        self.observer, self.new_epoch = observer, new_epoch
        self._met: tuple[str, str] | None = None
        """Epoch and identity of the bus in the last round."""
        self._gone: list[Mark] = []
        """Marks whose entries the bus lost, as found in this round."""
        self._marked_at = 0
        self._rounds = 0
        self._stop = anyio.Event()
        self._failing = False

    def stop(self) -> None:
        """Lets `run` return."""
        self._stop.set()

    async def run(self, interval_s: float = 1.0) -> None:
        """Checks until `stop`; an unreachable bus or store is said once and asked again."""
        while not self._stop.is_set():
            try:
                await self.check()
            except (BusError, StoreError) as error:
                if not self._failing:
                    self._failing = True
                    log.warning("Loss check failed, tried again later", extra={"error": str(error)})
            else:
                if self._failing:
                    self._failing = False
                    log.info("Loss check works again")
            with anyio.move_on_after(interval_s * random.uniform(0.8, 1.2)):
                await self._stop.wait()

    async def check(self) -> int:
        """One round; returns how many outbox rows became pending again.

        Raises BusUnavailable or Unavailable; the next round does what this one could not.
        """
        witness = await self.store.witness()
        # Before the identity: an empty bus gets a new epoch, so it stays known as a new one.
        epoch = await self.bus.epoch(self.new_epoch())
        identity = await self.bus.identity()
        if not witness.epoch:
            await self._remember([], witness, epoch, identity)
            return 0
        lost = await self._lost(witness, epoch, identity)
        moved = (epoch, identity) != (witness.epoch, witness.identity)
        # Another worker may have remembered the new bus before this one looked.
        met, self._met = self._met, (epoch, identity)
        if self.suspected is not None and (lost or moved or (met and met != self._met)):
            self.suspected()
        if lost or moved:
            return await self._remember(lost, witness, epoch, identity)
        await self._mark(witness, epoch, identity)
        return 0

    # --- what was lost --------------------------------------------------------------------------

    async def _lost(self, witness: Witness, epoch: str, identity: str) -> list[Lost]:
        """What may be missing on the bus; empty where it is as it was."""
        moved = (epoch, identity) != (witness.epoch, witness.identity)
        lost: list[Lost] = []
        self._gone = []
        for topic, newest in sorted(witness.marks.items()):
            # A server that was restarted or has taken over may lack what came after the mark.
            if moved or not await self.bus.holds(topic, newest.entry_id):
                lost.append(await self._after_newest_survivor(topic))
        if moved:
            lost.append(self._elsewhere(lost, emptied=epoch != witness.epoch))
        return lost

    async def _after_newest_survivor(self, topic: str) -> Lost:
        for mark in await self.store.marks(topic):
            if await self.bus.holds(topic, mark.entry_id):
                return Lost(topic=topic, after=mark.max_seq, since=mark.at - self.margin_us)
            self._gone.append(mark)
        return Lost(topic=topic, after=0, since=0)

    @staticmethod
    def _elsewhere(lost: Sequence[Lost], *, emptied: bool) -> Lost:
        """For topics without marks, nothing tells what survived.

        They share the fate of the marked topic that lost most. An emptied bus, and one that was never
        marked, has lost everything.
        """
        if emptied or not lost:
            return Lost(topic="", after=0, since=0)
        return Lost(topic="", after=_NEVER, since=min(one.since for one in lost))

    async def _remember(
        self, lost: Sequence[Lost], witness: Witness, epoch: str, identity: str
    ) -> int:
        try:
            rows = await self.store.republish(lost, seen=witness, epoch=epoch, identity=identity)
        except Conflict:
            return 0  # another worker saw it first, and has done this
        if self._gone:
            # The store forgets those that count more rows than the survivor. One that counts as many
            # would be missed in every round from now on.
            await self.store.record([], self._gone)
        if lost:
            topics = ", ".join(one.topic for one in lost if one.topic) or "all"
            log.warning(
                "The bus lost messages or may have, they are published again",
                extra={"rows": rows, "topics": topics, "emptied": epoch != witness.epoch},
            )
            if self.observer is not None:
                self.observer.notice("bus.lost", {"rows": rows, "topics": topics})
            if self.republished is not None:
                self.republished(rows)
        self._marked_at = 0
        return rows

    # --- marks ----------------------------------------------------------------------------------

    async def _mark(self, witness: Witness, epoch: str, identity: str) -> None:
        """Notes how far each topic is, unless it is where it was."""
        now = self.clock.now()
        if 0 <= now - self._marked_at < self.mark_every_us:
            return
        fresh: list[Mark] = []
        for topic in sorted({*self.topics(), *witness.marks}):
            known = witness.marks.get(topic)
            if known is not None and 0 <= now - known.at < self.mark_every_us:
                continue  # another worker has just done it
            entry_id = await self.bus.last_entry_id(topic)
            if entry_id is not None and (known is None or known.entry_id != entry_id):
                # `settled` was read before the entry id, so what it counts is in the topic by now.
                fresh.append(Mark(topic=topic, at=now, entry_id=entry_id, max_seq=witness.settled))
        if fresh and (epoch, identity) != (
            await self.bus.epoch(self.new_epoch()),
            await self.bus.identity(),
        ):
            return  # the entry ids may be another server's; the next round finds out
        dropped: list[Mark] = []
        if self._rounds % 60 == 0:
            for topic in witness.marks:
                dropped += thinned(await self.store.marks(topic), now, self.retention_us)
        if fresh or dropped:
            await self.store.record(fresh, dropped)
        self._marked_at = now
        self._rounds += 1


def thinned(marks: Sequence[Mark], now: int, retention_us: int) -> list[Mark]:
    """The marks of a topic that may be forgotten.

    Kept are all of the last two minutes, the first of each minute of the last two hours, and the
    first of each hour before that, up to the retention. How much more is published again because a
    mark is missing grows with how far back the bus has fallen.
    """
    dropped: list[Mark] = []
    kept: set[tuple[int, int]] = set()
    for mark in sorted(marks, key=lambda mark: mark.at):
        age = now - mark.at
        if age < 2 * MINUTE_US:
            continue
        span = MINUTE_US if age < 2 * HOUR_US else HOUR_US
        place = (span, mark.at // span)
        if age >= retention_us or place in kept:
            dropped.append(mark)
        kept.add(place)
    return dropped
