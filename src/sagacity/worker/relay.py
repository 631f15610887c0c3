"""The relay's sweep: publishes what was committed and has not left.

A worker publishes its own rows right after commit; the sweep is for what that missed, because the
process died, the bus was away, or the row was written by a program that runs no worker. Whole
prefixes of a lane are sent in order, so copies may appear, gaps and inversions may not
(``protocol.md`` 3.2). Any number of relays may run.
"""

from __future__ import annotations

import logging

import anyio

from sagacity.core.errors import BusError, BusUnavailable, StoreError, Unavailable
from sagacity.ports import Bus, Clock, Observer, OutboxStore, PendingRow

log = logging.getLogger(__name__)

PAUSE_MAX_S = 10.0
"""Longest pause between two tries of what did not go on."""


class Relay:
    """Sweeps one store's outbox onto one bus.

    `age_us`: how old a row must be before the sweep takes it from the worker that wrote it.
    """

    def __init__(
        self,
        store: OutboxStore,
        bus: Bus,
        clock: Clock,
        *,
        age_us: int = 1_000_000,
        limit: int = 500,
        observer: Observer | None = None,
    ) -> None:
        self.store, self.bus, self.clock = store, bus, clock
        self.age_us, self.limit, self.observer = age_us, limit, observer
        self._wake = anyio.Event()
        self._urgent = False
        self._stopping = False
        self._refused: dict[str, int] = {}
        self._sent: frozenset[int] = frozenset()
        """The rows that the last sweep published."""
        self._repeats = 0
        """How many sweeps in a row found nothing but rows that had just been published."""

    def notify(self) -> None:
        """Something was committed that nobody publishes: sweep now, whatever its age."""
        self._urgent = True
        self._wake.set()

    def stop(self) -> None:
        """Lets `run` return after the sweep under way."""
        self._stopping = True
        self._wake.set()

    async def sweep(self, *, age_us: int | None = None) -> int:
        """Publishes what has waited for `age_us`; returns how many messages left.

        Raises BusUnavailable and Unavailable. A row that the bus refuses holds up its own lane only.
        """
        older_than = self.clock.now() - (self.age_us if age_us is None else age_us)
        rows = await self.store.pending(older_than, self.limit)
        seqs = [row.seq for row in rows]
        sent, self._sent = self._sent, frozenset()
        repeats, self._repeats = self._repeats, 0
        if not rows:
            return 0
        try:
            await self.bus.publish([row.envelope for row in rows])
        except BusUnavailable:
            raise
        except BusError:
            return await self._one_lane_at_a_time(older_than)
        # Noted before they are forgotten, which may fail.
        self._sent = frozenset(seqs)
        if sent.issuperset(seqs):
            self._repeats = repeats + 1
        await self.store.published(seqs)
        if self.observer is not None:
            self.observer.notice("relay.swept", {"messages": len(rows)})
        return len(rows)

    async def _one_lane_at_a_time(self, older_than: int) -> int:
        """The bus refuses some row: publish everything else around its lane, page by page."""
        blocked: set[str] = set()
        told: set[str] = set()
        moved = after = 0
        while rows := await self.store.pending(older_than, self.limit, after):
            after = rows[-1].seq
            sent: list[int] = []
            try:
                for row in rows:
                    if row.lane and row.lane in blocked:
                        continue
                    try:
                        await self.bus.publish([row.envelope])
                    except BusUnavailable:
                        raise
                    except BusError as error:
                        blocked.add(row.lane)
                        self._tell_refusal(row, error, told)
                    else:
                        self._refused.pop(row.envelope.id, None)
                        sent.append(row.seq)
            finally:
                if sent:
                    await self.store.published(sent)
                moved += len(sent)
        return moved

    def _tell_refusal(self, row: PendingRow, error: BusError, told: set[str]) -> None:
        """One line for a topic and a sweep, the first time and then at each hundredth try."""
        tries = self._refused[row.envelope.id] = self._refused.get(row.envelope.id, 0) + 1
        if row.envelope.topic in told or (tries not in (1, 10) and tries % 100):
            return
        told.add(row.envelope.topic)
        log.error(
            "Bus refuses a message, its lane waits",
            extra={
                "message_id": row.envelope.id,
                "type": row.envelope.type,
                "topic": row.envelope.topic,
                "tries": tries,
                "error": str(error),
            },
        )

    async def run(self, interval_s: float = 0.5) -> None:
        """Sweeps until `stop`; waits out servers that are away, with one log line each time.

        Rows that another transaction is forgetting right now cannot be forgotten here, and come again;
        where a sweep finds no others, the next one waits twice as long each time.
        """
        away = False
        pause = interval_s
        while not self._stopping:
            self._wake = anyio.Event()
            urgent, self._urgent = self._urgent, False
            try:
                moved = await self.sweep(age_us=0 if urgent else None)
            except (BusUnavailable, Unavailable) as error:
                if not away:
                    log.warning("Relay waits for its servers", extra={"error": str(error)})
                away, pause = True, min(2 * pause, PAUSE_MAX_S)
                moved = 0
            except StoreError as error:
                # The same rows are published again next time, in vain: not as fast as it goes.
                pause = min(2 * pause, PAUSE_MAX_S)
                log.error("Relay cannot sweep", extra={"error": str(error)})  # noqa: TRY400 - one line
                moved = 0
            else:
                if away:
                    log.info("Relay goes on")
                away = False
                pause = min(2 * pause, PAUSE_MAX_S) if self._repeats else interval_s
                if self._repeats == 2:
                    log.warning(
                        "Published rows stay pending, somebody else holds them",
                        extra={"rows": moved},
                    )
            if moved < self.limit or self._repeats:
                with anyio.move_on_after(pause):
                    await self._wake.wait()
