"""What waits to be put into a batch, and what may run beside what is running already.

A worker runs several batches at the same time, so that one is decoded and decided while the database
writes another. No two of them may touch the same instance, and what came first for an instance goes
first: a message whose instance is in a batch under way stays here until that batch is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable

import msgspec

from sagacity.core.delivery import Delivery
from sagacity.worker.sorting import Input, Sorted

ALONE_FROM = 3
"""An entry handed out this often is run alone: it may be what ends the process."""


def may_kill(one: Input) -> bool:
    """True for an entry that must not even be decoded before it is noted that it is tried."""
    return isinstance(one, Delivery) and one.attempt >= ALONE_FROM


class Taken(msgspec.Struct, eq=False):
    """One batch; give it back with `Intake.done`."""

    inputs: list[Sorted]
    exclusive: bool = False
    """True where no other batch may run beside it."""
    alone: bool = False
    """True where its one entry may be what ends the process."""
    touches: set[Hashable] = msgspec.field(default_factory=set[Hashable])


class Intake:
    """Inputs in the order they came; pure."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Sorted, frozenset[Hashable] | None]] = deque()
        self._entries: set[tuple[str, str]] = set()
        """Stream entries (topic, entry id) that wait or are in a batch."""
        self._running: set[Hashable] = set()
        self._batches = self._taken = 0
        self._exclusive = False
        self._alone = False
        self._gave_way = True
        """False where the last batch was alone: what is alone and was held then lets others go."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Batches taken and not done."""
        return self._batches

    @property
    def held(self) -> int:
        """Inputs that wait or are in a batch under way."""
        return len(self._waiting) + self._taken

    @property
    def alone(self) -> bool:
        """True while an entry that may be what ends the process is tried: nothing else may be."""
        return self._alone

    def add(self, inputs: Iterable[Sorted]) -> None:
        """Adds what came; an entry that was handed out once more while it is here is left out."""
        for one in inputs:
            if isinstance(one.input, Delivery):
                entry = (one.input.topic, one.input.entry_id)
                if entry in self._entries:
                    continue
                self._entries.add(entry)
            self._waiting.append((one, one.touches))

    def take(self, limit: int) -> Taken | None:
        """The next batch of up to `limit` inputs; None where nothing may run now."""
        if self._exclusive or not self._waiting:
            return None
        batch = Taken([])
        held: set[Hashable] = set()
        left: list[tuple[Sorted, frozenset[Hashable] | None]] = []
        while self._waiting and len(batch.inputs) < limit:
            one, touches = self._waiting.popleft()
            alone = may_kill(one.input)
            if alone and one.tries and not self._gave_way:
                # Another worker holds it. That may take long, and nothing runs beside it.
                held |= touches or frozenset()
                left.append((one, touches))
                continue
            if alone or touches is None:
                if self._batches or left or (alone and batch.inputs):
                    # It goes when nothing else runs, and what came after it not before.
                    self._waiting.appendleft((one, touches))
                    break
                batch.exclusive = True
            elif not touches.isdisjoint(self._running) or not touches.isdisjoint(held):
                held |= touches
                left.append((one, touches))
                continue
            batch.inputs.append(one)
            batch.touches.update(touches or ())
            if alone:
                batch.alone = True
                break
        self._waiting.extendleft(reversed(left))
        if not batch.inputs:
            if self._gave_way or self._batches:
                return None
            self._gave_way = True  # nobody wants to go before it
            return self.take(limit)
        self._gave_way = not batch.alone
        self._alone = batch.alone
        self._batches += 1
        self._taken += len(batch.inputs)
        self._running |= batch.touches
        self._exclusive = batch.exclusive
        return batch

    def done(self, batch: Taken, again: Iterable[Sorted] = ()) -> None:
        """A batch has ended; what is to be tried `again` goes before everything that waits."""
        self._batches -= 1
        self._taken -= len(batch.inputs)
        self._running -= batch.touches
        if batch.exclusive:
            self._exclusive = self._alone = False
        for one in batch.inputs:
            if isinstance(one.input, Delivery):
                self._entries.discard((one.input.topic, one.input.entry_id))
        for one in reversed(list(again)):
            if isinstance(one.input, Delivery):
                self._entries.add((one.input.topic, one.input.entry_id))
            self._waiting.appendleft((one, one.touches))

    def give_up(self) -> int:
        """Forgets what waits, which another worker finds; returns how many inputs that were."""
        dropped = len(self._waiting)
        for one, _ in self._waiting:
            if isinstance(one.input, Delivery):
                self._entries.discard((one.input.topic, one.input.entry_id))
        self._waiting.clear()
        return dropped
