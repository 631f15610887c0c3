"""What a session's transaction holds: entities with pending events, and the rows written of them.

The transaction keeps every recording entity alive from the moment it records (an identity map is
weak, and forgets clean, flushed and deleted entities). Each SAVEPOINT is a frame on top of the
transaction's own; a frame that is rolled back gives the entities of its part the lists they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from sagacity.core.delivery import Envelope
from sagacity.core.messages import Event
from sagacity.recording import RecordedEvent, RecordsEvents, pending, replace_pending


class Standing(Enum):
    """What became of an entity when (a part of) its transaction was undone."""

    OWN = "own"
    """The database knows it: its attributes are undone, and so are its events."""
    LOOSE = "loose"
    """Nobody restores its attributes (new, or not mapped at all): its events stay with it, for the
    next transaction it is added to."""


@dataclass(slots=True, eq=False)
class Written:
    """An outbox row of the open transaction."""

    event: Event | None
    """None for a row that concerns no subscriber here, such as a command."""
    envelope: Envelope
    seq: int
    lane: str
    shown: bool = False
    """True once the subscribers inside the transaction have seen it."""


class _Frame:
    def __init__(self) -> None:
        self.before: dict[int, tuple[RecordsEvents, tuple[RecordedEvent, ...]]] = {}
        """The lists of entities as they were before this frame first changed them."""
        self.joined: set[int] = set()
        """Entities held since this frame."""
        self.drained: list[tuple[RecordsEvents, RecordedEvent]] = []
        self.written: list[Written] = []


class Held:
    """The bookkeeping of one session; the session tells it of each begin and end."""

    def __init__(self) -> None:
        self._frames = [_Frame()]
        self._recorders: dict[int, RecordsEvents] = {}

    @property
    def recorders(self) -> tuple[RecordsEvents, ...]:
        """The entities held, in the order they joined."""
        return tuple(self._recorders.values())

    @property
    def written(self) -> list[Written]:
        """The rows of the whole open transaction, savepoints included, oldest first."""
        return [row for frame in self._frames for row in frame.written]

    def hold(self, recorder: RecordsEvents) -> None:
        """Keeps an entity; to be called before its list changes, however often."""
        frame, key = self._frames[-1], id(recorder)
        frame.before.setdefault(key, (recorder, pending(recorder)))
        if key not in self._recorders:
            self._recorders[key] = recorder
            frame.joined.add(key)

    def release(self, recorder: RecordsEvents) -> None:
        """Lets an entity go with whatever it has pending."""
        self._recorders.pop(id(recorder), None)

    def drain(self) -> list[tuple[RecordsEvents, RecordedEvent]]:
        """Takes all pending events, in the order they were recorded."""
        taken: list[tuple[RecordsEvents, RecordedEvent]] = []
        for recorder in self.recorders:
            items = pending(recorder)
            if items:
                self.hold(recorder)
                taken.extend((recorder, item) for item in items)
                replace_pending(recorder, (), quietly=True)
        taken.sort(key=lambda pair: pair[1].number)
        self._frames[-1].drained.extend(taken)
        return taken

    def note(self, rows: Iterable[Written]) -> None:
        """Remembers rows written now."""
        self._frames[-1].written.extend(rows)

    def begin_savepoint(self) -> None:
        """A SAVEPOINT was set."""
        self._frames.append(_Frame())
        for recorder in self.recorders:  # an unmapped one does not tell when it records again
            self.hold(recorder)

    def release_savepoint(self) -> None:
        """The innermost SAVEPOINT was released: its part belongs to the frame around it."""
        inner, outer = self._frames.pop(), self._frames[-1]
        for key, kept in inner.before.items():
            outer.before.setdefault(key, kept)
        outer.joined |= inner.joined
        outer.drained += inner.drained
        outer.written += inner.written

    def undo_savepoint(self, standing: Callable[[RecordsEvents], Standing]) -> None:
        """The innermost SAVEPOINT was rolled back."""
        frame = self._frames.pop()
        for key, (recorder, before) in frame.before.items():
            joined = key in frame.joined
            if joined:
                self.release(recorder)
            if joined and standing(recorder) is Standing.LOOSE:
                self._give_back(frame, recorder)
                continue
            replace_pending(recorder, before, quietly=True)
            if before:  # one that joined stays attached: it is held by the frame around now
                self.hold(recorder)

    def commit(self) -> list[Written]:
        """The transaction was committed; returns the rows that are public now.

        Entities that recorded too late for this commit stay held for the next one.
        """
        rows = self.written
        late = [recorder for recorder in self.recorders if pending(recorder)]
        self._clear()
        for recorder in late:
            self.hold(recorder)
        return rows

    def undo(self, standing: Callable[[RecordsEvents], Standing]) -> None:
        """The transaction was rolled back: nothing of it may reach anyone."""
        while len(self._frames) > 1:
            self.release_savepoint()
        frame = self._frames[0]
        for recorder, _ in frame.before.values():
            if standing(recorder) is Standing.LOOSE:
                self._give_back(frame, recorder)
            else:
                replace_pending(recorder, (), quietly=True)
        self._clear()

    def _clear(self) -> None:
        self._frames = [_Frame()]
        self._recorders = {}

    @staticmethod
    def _give_back(frame: _Frame, recorder: RecordsEvents) -> None:
        back = [item for owner, item in frame.drained if owner is recorder]
        items = sorted((*back, *pending(recorder)), key=lambda item: item.number)
        replace_pending(recorder, items, quietly=True)
