"""What the worker needs from the world: small protocols whose promises are prose.

A backend is done when it passes the suites in `sagacity.testing.conformance`. Every time is an
integer of microseconds since 1970 in UTC. Every method may raise `Unavailable` (store) or
`BusUnavailable` (bus); both mean that trying again later is right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from sagacity.core.delivery import Delivery, Envelope
from sagacity.core.instance import Instance
from sagacity.core.plan import (
    DeadLetterRow,
    Known,
    Loaded,
    OutboxRow,
    ParkedRow,
    Plan,
    TransitionRow,
)


class Clock(Protocol):
    """Where the time of a store comes from. Production stores follow their database's clock."""

    def now(self) -> int:
        """Microseconds since 1970, UTC. Never goes back by more than a clock correction."""
        ...


# --------------------------------------------------------------------------------------------- bus


class Bus(Protocol):
    """Topics that keep their messages, read by consumer groups.

    A message is kept at least until every group that has joined its topic acknowledged it. Order
    of one topic is the order of publishing. A group that joins late starts at the first message
    that is still kept, never at "now".
    """

    async def publish(self, envelopes: Sequence[Envelope]) -> None:
        """Appends each envelope to its topic, in order.

        Per topic all or nothing, and in order; never retried silently, so no copy is made unless
        the caller asks again. Raises BusUnavailable when it is unknown or false that all arrived.
        """
        ...

    async def join(self, group: str, consumer: str, topics: Collection[str]) -> Subscription:
        """Makes sure that the group exists at the start of each topic, and joins it.

        Two consumers of one group share the messages; two groups each get all of them.
        """
        ...

    async def check(self) -> list[str]:
        """Reaches the server; returns one line per unsafe setting found (an empty list is good)."""
        ...

    async def close(self) -> None:
        """Ends all connections. Safe to call twice."""
        ...


class Subscription(Protocol):
    """One consumer of one group."""

    async def read(self, limit: int, wait_ms: int) -> list[Delivery]:
        """Up to `limit` entries not handed out before; waits up to `wait_ms` for the first one.

        The first calls after joining, and after any broken connection, return what this consumer
        was handed before and has not acknowledged. Entries that are no messages come as a
        `Delivery` with a fault. Must not be cancelled while it waits: call `wake` instead.
        """
        ...

    async def reclaim(self, min_idle_ms: int, limit: int) -> list[Delivery]:
        """Takes over entries that any consumer of the group left unacknowledged for `min_idle_ms`.

        Call again while it returns something. `Delivery.attempt` counts the hand-outs.
        """
        ...

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Marks entries as done for the group. Only after their effects are committed."""
        ...

    def wake(self) -> None:
        """Makes a waiting `read` return soon."""
        ...

    async def close(self) -> None:
        """Leaves. What was not acknowledged stays for the other consumers to reclaim."""
        ...


# ------------------------------------------------------------------------------------------- store


class Lookup(msgspec.Struct, frozen=True):
    """A question for the correlation keys: which instances have this value?"""

    saga_type: str
    name: str
    value: str


class PendingRow(msgspec.Struct, frozen=True):
    """An outbox row that the bus has not acknowledged yet."""

    seq: int
    lane: str
    created_at: int
    envelope: Envelope


class Transaction(Protocol):
    """The one transaction of a batch. Leaving its context commits; an exception rolls back.

    So does an exception that one of its methods raised and that was caught inside: the exit raises it
    again. An optimistic one is for one `write`, which is its end.
    """

    @property
    def now(self) -> int:
        """The store's time at the begin of the transaction."""
        ...

    async def correlated(self, lookups: Collection[Lookup]) -> Mapping[Lookup, tuple[str, ...]]:
        """Keys of the instances that have each value, sorted.

        A value that only finished instances had is there without keys (`Plan.correlations_past`);
        one that nobody ever had is left out.
        """
        ...

    async def load(self, wanted: Mapping[str, Collection[str]], *, wait: bool = False) -> Loaded:
        """Loads the instances (saga type -> keys) that are free, and locks them until the end.

        With `wait` it waits for the held ones too, a few seconds at most, then calls them busy. An
        optimistic transaction may load without a lock; then `write` raises Conflict where one of them
        has changed, also one that the plan leaves alone.
        """
        ...

    async def known(
        self,
        inbox: Collection[tuple[str, str]],
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Collection[tuple[str, str]] = (),
    ) -> Known:
        """Reads, under the locks of `load`, what guards against a second effect.

        An optimistic transaction may have no locks; then `write` raises Conflict where a timeout that is
        told here as armed, and that the plan cancels, has gone.
        """
        ...

    async def read(
        self,
        wanted: Mapping[str, Collection[str]],
        inbox: Collection[tuple[str, str]],
        timeouts: Collection[tuple[str, str, int]] = (),
        parked: Collection[tuple[str, str]] = (),
        *,
        wait: bool = False,
    ) -> tuple[Loaded, Known]:
        """`load` and `known` in as few trips as possible.

        What is `seen` may be older than the instances; then `write` raises Conflict.
        """
        ...

    async def write(self, plan: Plan, published: Sequence[int] = ()) -> list[PendingRow]:
        """Writes the plan and forgets the pending rows `published` (seq numbers).

        Returns, in seq order, the whole pending prefix of the lanes the plan wrote to, its own rows
        included, and the plan's rows without a lane: publish these after commit. A message whose id
        is in the outbox already is left out: it is the same message. Raises Conflict or KeyTaken as
        `Plan` says, DataRefused for a value the database does not take.
        """
        ...


class DueTimeout(msgspec.Struct, frozen=True):
    """A timeout whose time has come."""

    uid: str
    name: str
    generation: int
    due_at: int
    saga_type: str
    saga_key: str


class Due(msgspec.Struct):
    """What the clock brought up. Read without locks: check again under the lock."""

    timeouts: list[DueTimeout]
    parked: list[ParkedRow]
    next_at: int | None
    """When the next row of this store will be due, if one is known."""


class Store(Protocol):
    """State, inbox, outbox, timeouts and parked messages of one service or several."""

    @property
    def clock(self) -> Clock:
        """The store's time."""
        ...

    async def prepare(self, *, create: bool = False) -> None:
        """Reaches the database and compares its schema with the code.

        Raises SchemaError where tables are missing or older (unless `create`), or newer.
        """
        ...

    def transaction(self, *, optimistic: bool = False) -> AbstractAsyncContextManager[Transaction]:
        """Begins the transaction of a batch.

        With `optimistic` the store may leave out locks that cost more than the race they prevent.

        Raises Unavailable from the context's exit too; then it is unknown whether it committed, and
        the right answer is to run the whole batch again: the guards decide.
        """
        ...

    async def due(self, saga_types: Collection[str], limit: int) -> Due:
        """Timeouts of these saga types and messages parked for them that are due, oldest first."""
        ...

    async def close(self) -> None:
        """Ends all connections. Safe to call twice."""
        ...


class OutboxStore(Protocol):
    """The relay's view of a store."""

    async def pending(self, older_than: int, limit: int, after: int = 0) -> list[PendingRow]:
        """Whole prefixes, in seq order, of lanes that have a pending row created at or before
        `older_than`; at most `limit` rows, never a lane's later row without its earlier ones.

        Rows up to number `after` are left out: for a relay that has looked at those already.
        """
        ...

    async def published(self, seqs: Sequence[int]) -> None:
        """Forgets pending rows; one that is gone already is no error."""
        ...

    async def append(self, rows: Sequence[OutboxRow]) -> list[PendingRow]:
        """Writes outbox rows in a transaction of their own; a known message id is left out.

        Returns what to publish, as `Transaction.write` does.
        """
        ...


class Task(msgspec.Struct, frozen=True):
    """A parked message that this process may work on, until `lease_until`."""

    row: ParkedRow
    token: str
    """Names this lease; finishing with an older one raises Conflict."""
    lease_until: int
    tombstone: bool
    """True for a command whose undo has come first."""


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended. Exactly one of done, `retry_at` and `dead_letter`."""

    task: Task
    outbox: tuple[OutboxRow, ...] = ()
    retry_at: int | None = None
    """Tried again then; the row stays with one attempt more. The lane waits."""
    error: str = ""
    dead_letter: DeadLetterRow | None = None
    counts: bool = True
    """False where the try was no attempt (the process was asked to stop)."""


class Work(Protocol):
    """The transaction of one task."""

    @property
    def session(self) -> Any:
        """The user's session (SQLAlchemy `AsyncSession`), begun on first use.

        A store without SQL raises ConfigurationError.
        """
        ...

    async def finish(self, finish: Finish) -> list[PendingRow]:
        """Writes the end of the task with whatever the session holds, and commits.

        Returns the pending rows to publish. Raises Conflict when the lease was lost: then nothing
        was written.
        """
        ...


class TaskStore(Protocol):
    """The participants' view of a store: messages parked with reason ``work``.

    Commands of one lane are handed out one at a time, whichever consumers they are for, in `sequence`: number n+1 only when n is
    finished, or when n has not been seen for `gap_us`. An undo command (``envelope.undoes``) does not wait
    for numbers, only for a task of its lane that is being worked on; finishing it leaves a tombstone for what it
    undoes. A row without a lane waits for nobody.
    """

    async def claim(self, consumers: Mapping[str, int], lease_us: int, gap_us: int) -> list[Task]:
        """Hands out due tasks: at most the given number per consumer.

        Expired leases count as due. Their holders vanished, perhaps because of the message: so such a
        row has one attempt more than it had (``row.attempts`` of its task, and as it is stored).
        """
        ...

    async def renew(self, tasks: Sequence[Task], lease_us: int, /) -> list[Task]:
        """Extends leases; the ones that were lost are left out of the result."""
        ...

    def work(self, task: Task) -> AbstractAsyncContextManager[Work]:
        """The task's transaction; leaving without `finish` rolls the session back."""
        ...

    async def finish(self, finishes: Sequence[Finish]) -> list[PendingRow]:
        """Ends tasks that used no session, in one transaction. Lost leases are skipped."""
        ...

    async def next_task_at(self, consumers: Collection[str]) -> int | None:
        """When the next parked task will be due, if one is known."""
        ...


class Retention(msgspec.Struct, frozen=True):
    """How long finished things are kept, in microseconds."""

    inbox_us: int
    outbox_us: int
    history_us: int
    finished_us: int
    dead_letters_us: int


class RetentionStore(Protocol):
    """The janitor's view of a store."""

    async def clean(self, retention: Retention, limit: int, /) -> int:
        """Deletes up to `limit` rows of each kind that are older; returns how many went."""
        ...


class SagaRow(msgspec.Struct, frozen=True):
    """One line of a list of instances."""

    saga_type: str
    saga_key: str
    uid: str
    version: int
    status: str
    state: str
    started_at: int
    updated_at: int

    @property
    def cursor(self) -> str:
        """Where the next page begins: give it as `after` to `Inspector.sagas`."""
        return f"{self.updated_at} {self.saga_type} {self.saga_key}"


class DeadLetter(msgspec.Struct, frozen=True):
    """A stored dead letter; `id` names it for replay."""

    id: int
    row: DeadLetterRow
    replayed_at: int | None


class Inspector(Protocol):
    """Read-only questions of operators, and the replay of dead letters."""

    async def sagas(
        self,
        *,
        saga_type: str = "",
        status: str = "",
        state: str = "",
        limit: int = 50,
        after: str = "",
    ) -> list[SagaRow]:
        """Instances, the ones that have not moved for longest first; `after` is the `cursor` of the
        last row seen.
        """
        ...

    async def saga(self, saga_type: str, saga_key: str) -> Instance | None:
        """One instance."""
        ...

    async def history(self, saga_type: str, saga_key: str) -> list[TransitionRow]:
        """Its transitions, oldest first."""
        ...

    async def dead_letters(self, *, consumer: str = "", limit: int = 50) -> list[DeadLetter]:
        """Dead letters that were not replayed, newest first."""
        ...

    async def replay(self, ids: Sequence[int]) -> int:
        """Parks the dead letters again, due at once, for their consumer; returns how many.

        One that was never decoded, was replayed before, or is parked is left out. Attempts start at
        zero; the reason is ``retry`` for a saga's message and ``work`` for a participant's. One that
        concerns nobody yet (`DeadLetterRow.unrouted`) is pending in the outbox again instead, and its
        inbox row is forgotten.
        """
        ...

    async def counts(self) -> dict[str, int]:
        """Rows that matter to an operator: ``sagas.<status>``, ``outbox.pending``, ``timeouts``,
        ``parked``, ``parked.<consumer>`` (up to a ``#``), ``dead_letters``; and ``outbox.oldest_us``, the
        age of the oldest pending row (0 where there is none).
        """
        ...


class BusUpkeep(Protocol):
    """The janitor's view of a bus."""

    async def trim(self, topics: Collection[str], retention_us: int) -> int:
        """Removes entries older than `retention_us` that every group has acknowledged.

        A topic that no group has joined is left alone. Returns how many entries went.
        """
        ...

    async def forget_consumers(self, group: str, topics: Collection[str], idle_us: int) -> int:
        """Removes consumers that were idle for `idle_us` and have nothing pending."""
        ...


# -------------------------------------------------------------------------------- loss of the bus


class BusMemory(Protocol):
    """A bus that can tell whether it still holds what it held: the loss check of ``protocol.md`` 3.5.

    A bus on another server, an emptied one, and one that fell back to an older state all look like
    the bus of before. These questions tell them apart.
    """

    async def epoch(self, proposed: str) -> str:
        """The random value written when the bus was first used; `proposed` is written if none is there.

        Whoever empties the bus deletes it too.
        """
        ...

    async def identity(self) -> str:
        """Names the running server; differs after a restart and after a failover."""
        ...

    async def last_entry_id(self, topic: str) -> str | None:
        """The highest entry id that a topic has given out; None where there is no such topic, or
        nothing was ever published to it.
        """
        ...

    async def holds(self, topic: str, entry_id: str) -> bool:
        """True where the entry is there, read or not."""
        ...


class Mark(msgspec.Struct, frozen=True):
    """How far a topic was at a time: every message for it whose outbox row has a number of at most
    `max_seq` had reached the bus, at or before `entry_id`.
    """

    topic: str
    at: int
    entry_id: str
    max_seq: int


class Witness(msgspec.Struct, frozen=True):
    """What a store knows of its bus."""

    epoch: str
    """Empty before the first meeting."""
    identity: str
    settled: int
    """Every outbox row with a number up to this has left, as far as can be seen now."""
    marks: dict[str, Mark]
    """Topic -> its newest mark."""


class Lost(msgspec.Struct, frozen=True):
    """Outbox rows that the bus may have lost: with a number above `after`, or created at or after
    `since`.
    """

    topic: str
    """Empty: every topic that no other `Lost` of the same call names."""
    after: int
    since: int


class MarkStore(Protocol):
    """The loss check's view of a store."""

    async def witness(self) -> Witness:
        """The epoch, the identity, and the newest mark of each topic."""
        ...

    async def marks(self, topic: str) -> list[Mark]:
        """The marks of a topic, newest first."""
        ...

    async def record(self, fresh: Sequence[Mark], dropped: Sequence[Mark] = ()) -> None:
        """Adds marks and forgets others; one of a known topic and time replaces it."""
        ...

    async def republish(
        self, lost: Sequence[Lost], *, seen: Witness, epoch: str, identity: str
    ) -> int:
        """Makes outbox rows pending again and remembers the bus, in one transaction.

        Marks of a lost topic with a `max_seq` above its `after` are forgotten. Returns how many rows
        are pending that were not. Raises Conflict where epoch or identity are not those of `seen`:
        another worker was first.
        """
        ...


class Observer(Protocol):
    """What happens, told to whoever measures. Called after the fact; must not raise or wait."""

    def notice(self, name: str, attributes: Mapping[str, object]) -> None:
        """One fact, such as ``batch.committed``, with plain values."""
        ...
