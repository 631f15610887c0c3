"""The bus in memory: topics, groups and pending entries as Redis has them, for one process.

A real bus, not a fake: what is handed out stays pending until it is acknowledged, can be reclaimed,
and is handed out again. It lives in one event loop; several services may share it there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b

import anyio
import anyio.lowlevel
import msgspec

from sagacity.backends.memory.clock import SystemClock
from sagacity.codec import from_fields
from sagacity.core.delivery import Delivery, Envelope
from sagacity.core.errors import BusError
from sagacity.ports import Clock

_RAW_VALUE_BYTES_MAX = 4096


class Entry(msgspec.Struct, array_like=True):
    """One entry of a topic: a message, or fields that somebody else put there."""

    at: int
    envelope: Envelope | None = None
    fields: dict[bytes, bytes] | None = None


class Pending(msgspec.Struct, array_like=True):
    """An entry that was handed out and is not acknowledged."""

    consumer: str
    since: int
    attempt: int


class Group(msgspec.Struct, array_like=True):
    """Where a group stands in a topic."""

    position: int
    """Number of the last entry that was handed out."""
    pending: dict[int, Pending] = {}


class Topic(msgspec.Struct, array_like=True):
    """The entries that are kept, by number, and the groups."""

    last: int = 0
    """Number of the next entry less one."""
    newest: int = 0
    """Number of the newest entry; 0 before there was one."""
    entries: dict[int, Entry] = {}
    groups: dict[str, Group] = {}


class State(msgspec.Struct, array_like=True):
    """All that a bus holds."""

    epoch: str = ""
    base: int = 0
    """No entry of a new topic has a number up to this: numbers are never given out twice."""
    topics: dict[str, Topic] = {}


_decoder = msgspec.msgpack.Decoder(State)


class Topics:
    """The content of a bus, and who waits for more of it."""

    def __init__(self, clock: Clock, payload_bytes_max: int) -> None:
        self.clock = clock
        self.payload_bytes_max = payload_bytes_max
        self.state = State()
        self.waiting: set[MemorySubscription] = set()

    def append(self, name: str, entry: Entry) -> str:
        """Adds an entry, and lets whoever waits for one look; returns its entry id."""
        topic = self.topic(name)
        topic.last = topic.newest = topic.last + 1
        topic.entries[topic.last] = entry
        for subscription in list(self.waiting):
            if name in subscription.topics:
                subscription.rouse()
        return str(topic.last)

    def topic(self, name: str) -> Topic:
        """A topic, made if it is missing."""
        topic = self.state.topics.get(name)
        if topic is None:
            topic = self.state.topics[name] = Topic(last=self.state.base)
        return topic

    def highest(self) -> int:
        """The highest number given out so far."""
        state = self.state
        return max([state.base, *(topic.last for topic in state.topics.values())])

    def group(self, name: str, group: str) -> tuple[Topic, Group]:
        """A group of a topic, made at the first entry that is kept, never at the last."""
        topic = self.topic(name)
        return topic, topic.groups.setdefault(group, Group(position=0))

    def delivery(self, name: str, topic: Topic, number: int, attempt: int) -> Delivery:
        """An entry as it is handed out, with a fault where it is no message."""
        entry = topic.entries.get(number)
        if entry is not None and entry.envelope is not None:
            return Delivery(
                topic=name, entry_id=str(number), envelope=entry.envelope, attempt=attempt
            )
        fields = entry.fields if entry is not None and entry.fields is not None else {}
        envelope, fault = None, ""
        size = sum(len(key) + len(value) for key, value in fields.items())
        if entry is None:
            fault = f"lost: the payload of entry {number} of topic {name} is gone"
        elif size > self.payload_bytes_max:
            fault = (
                f"oversized: entry {number} of topic {name} has {size} bytes; expected at most "
                f"{self.payload_bytes_max}"
            )
            fields = {key: value[:_RAW_VALUE_BYTES_MAX] for key, value in fields.items()}
        else:
            try:
                envelope = from_fields(name, fields)
            except Exception as error:  # noqa: BLE001 - no entry may stop the reader
                reason = str(error) or type(error).__name__
                fault = f"undecodable: entry {number}: {reason}"
        raw = msgspec.msgpack.encode(fields) if envelope is None else b""
        return Delivery(
            topic=name,
            entry_id=str(number),
            envelope=envelope,
            attempt=attempt,
            raw=raw,
            fault=fault,
        )


class MemoryBus:
    """Topics in this process; see `sagacity.ports.Bus`.

    Args:
        clock: Tells how long entries are pending; the system's where none is given.
        payload_bytes_max: Largest body of a message, in bytes.
    """

    def __init__(self, clock: Clock | None = None, *, payload_bytes_max: int = 262_144) -> None:
        self._topics = Topics(clock if clock is not None else SystemClock(), payload_bytes_max)
        self._failovers = 0

    # --- Bus ------------------------------------------------------------------------------------

    async def publish(self, envelopes: Sequence[Envelope]) -> None:
        """Appends each envelope to its topic, in order. Raises BusError for one that is too large."""
        for envelope in envelopes:
            if len(envelope.body) > self._topics.payload_bytes_max:
                raise BusError(
                    f"message {envelope.id} of type {envelope.type} for topic {envelope.topic} has a "
                    f"body of {len(envelope.body)} bytes; expected at most {self._topics.payload_bytes_max}; "
                    "send a reference to large data, or raise payload_bytes_max on every worker"
                )
        await anyio.lowlevel.checkpoint()
        for envelope in envelopes:
            self._topics.append(
                envelope.topic, Entry(at=self._topics.clock.now(), envelope=envelope)
            )

    async def join(self, group: str, consumer: str, topics: Collection[str]) -> MemorySubscription:
        """Makes the group where it is missing, at the first entry kept, and joins it."""
        await anyio.lowlevel.checkpoint()
        subscription = MemorySubscription(
            self._topics, group, consumer, tuple(dict.fromkeys(topics))
        )
        for topic in subscription.topics:
            self._topics.group(topic, group)
        return subscription

    async def check(self) -> list[str]:
        """Nothing can be set wrongly."""
        return []

    async def close(self) -> None:
        """Wakes every waiting read. The entries stay: another worker may use the same bus."""
        for subscription in list(self._topics.waiting):
            subscription.wake()

    # --- for the janitor and the loss check -------------------------------------------------------

    async def trim(self, topics: Collection[str], retention_us: int) -> int:
        """Removes entries older than `retention_us` that every group has acknowledged.

        A topic that no group has joined is left alone. Returns how many entries went.
        """
        gone = 0
        oldest = self._topics.clock.now() - retention_us
        for name in topics:
            topic = self._topics.state.topics.get(name)
            if topic is None or not topic.groups:
                continue
            bound = min(min([*group.pending, group.position]) for group in topic.groups.values())
            old = [n for n, entry in topic.entries.items() if n < bound and entry.at < oldest]
            for number in old:
                del topic.entries[number]
            gone += len(old)
        return gone

    async def forget_consumers(
        self,
        group: str,  # noqa: ARG002
        topics: Collection[str],  # noqa: ARG002
        idle_us: int,  # noqa: ARG002
    ) -> int:
        """Consumers exist here only while something is pending for them: there is nothing to do."""
        return 0

    async def epoch(self, proposed: str) -> str:
        """The random value that says that this is the bus of before; see `BusMemory`."""
        state = self._topics.state
        state.epoch = state.epoch or proposed
        return state.epoch

    async def identity(self) -> str:
        """Names the running server; see `BusMemory`."""
        return f"memory-{self._failovers}"

    async def last_entry_id(self, topic: str) -> str | None:
        """The highest entry id a topic has given out; see `BusMemory`."""
        known = self._topics.state.topics.get(topic)
        return str(known.newest) if known is not None and known.newest else None

    async def holds(self, topic: str, entry_id: str) -> bool:
        """True where the entry is there, read or not."""
        known = self._topics.state.topics.get(topic)
        return known is not None and int(entry_id) in known.entries

    # --- for tests --------------------------------------------------------------------------------

    def put_fields(self, topic: str, fields: Mapping[bytes, bytes]) -> str:
        """Appends an entry as a foreign program might, message or not; returns its entry id."""
        return self._topics.append(topic, Entry(at=self._topics.clock.now(), fields=dict(fields)))

    def delete(self, topic: str, entry_id: str) -> None:
        """Deletes an entry, pending or not, as XDEL does."""
        del self._topics.state.topics[topic].entries[int(entry_id)]

    def wipe(self) -> None:
        """Loses everything, groups and epoch too, as FLUSHALL does; subscriptions live on."""
        self._topics.state = State(base=self._topics.highest())

    def messages(self, topic: str) -> list[Envelope]:
        """The messages of a topic that are kept, in order, read or not."""
        known = self._topics.state.topics.get(topic)
        entries = known.entries.values() if known is not None else ()
        return [entry.envelope for entry in entries if entry.envelope is not None]

    def snapshot(self) -> bytes:
        """All that the bus holds; equal bytes mean an equal bus."""
        state = self._topics.state
        topics = {
            name: msgspec.structs.replace(topic, groups=dict(sorted(topic.groups.items())))
            for name, topic in sorted(state.topics.items())
        }
        return msgspec.msgpack.encode(State(epoch=state.epoch, base=state.base, topics=topics))

    def restore(self, snapshot: bytes) -> None:
        """Makes the bus hold what it held at `snapshot`."""
        self._topics.state = _decoder.decode(snapshot)

    def fail_over(self, snapshot: bytes) -> None:
        """Falls back to an older state, as a replica that lagged behind does when it takes over."""
        highest = self._topics.highest()
        self.restore(snapshot)
        self._topics.state.base = highest
        for topic in self._topics.state.topics.values():
            topic.last = highest
        self._failovers += 1

    def state_hash(self) -> str:
        """32 hexadecimal digits that differ where the content differs."""
        return blake2b(self.snapshot(), digest_size=16).hexdigest()


class MemorySubscription:
    """One consumer of one group; see `sagacity.ports.Subscription`."""

    def __init__(self, content: Topics, group: str, consumer: str, topics: tuple[str, ...]) -> None:
        self.topics = topics
        self._content = content
        self._group = group
        self._consumer = consumer
        self._backlog: dict[str, int] = dict.fromkeys(topics, 0)
        """Topic -> last own pending entry that was handed out again since joining."""
        self._event = anyio.Event()
        self._woken = False
        self._closed = False
        self._turn = 0
        """Which topic comes first: a busy one must not starve the others."""
        self._sweep: dict[str, int] = {}
        """Topic -> last entry that the reclaim sweep under way has looked at."""

    async def read(self, limit: int, wait_ms: int) -> list[Delivery]:
        """Up to `limit` own pending or new entries, waiting for the first; see `Subscription`."""
        self._check_open()
        await anyio.lowlevel.checkpoint()
        # Nothing can happen between taking and returning, so nothing that was taken can get lost.
        found = self._take(limit)
        if not found and wait_ms > 0:
            with anyio.move_on_after(wait_ms / 1000):
                while not (found or self._woken or self._closed):
                    await self._roused()
                    found = self._take(limit)
        self._woken = False
        return found

    async def _roused(self) -> None:
        """Waits until something was published, or `wake` was called."""
        self._event = anyio.Event()
        self._content.waiting.add(self)
        try:
            await self._event.wait()
        finally:
            self._content.waiting.discard(self)

    def wake(self) -> None:
        """Makes a waiting `read`, or else the next one, return at once."""
        self._woken = True
        self.rouse()

    def rouse(self) -> None:
        """Makes a waiting `read` look again."""
        self._event.set()

    def _take(self, limit: int) -> list[Delivery]:
        taken: list[Delivery] = []
        first = self._turn % len(self.topics) if self.topics else 0
        self._turn += 1
        for name in (*self.topics[first:], *self.topics[:first]):
            taken += self._take_from(name, limit - len(taken))
        return taken

    def _take_from(self, name: str, limit: int) -> list[Delivery]:
        topic, group = self._content.group(name, self._group)
        taken: list[Delivery] = []
        now = self._content.clock.now()
        if name in self._backlog:
            for number in sorted(n for n in group.pending if n > self._backlog[name]):
                pending = group.pending[number]
                if pending.consumer != self._consumer:
                    continue
                if len(taken) >= limit:
                    return taken
                pending.since, pending.attempt = now, pending.attempt + 1
                self._backlog[name] = number
                taken.append(self._content.delivery(name, topic, number, pending.attempt))
            del self._backlog[name]
        for number in self._unread(topic, group, limit - len(taken)):
            group.position = number
            group.pending[number] = Pending(self._consumer, now, 1)
            taken.append(self._content.delivery(name, topic, number, 1))
        return taken

    @staticmethod
    def _unread(topic: Topic, group: Group, limit: int) -> Iterator[int]:
        if group.position >= topic.last:
            return iter(())
        if group.position == 0 or group.position + 1 not in topic.entries:
            numbers = sorted(n for n in topic.entries if n > group.position)
            return iter(numbers[: max(0, limit)])
        end = min(topic.last, group.position + max(0, limit))
        return (n for n in range(group.position + 1, end + 1) if n in topic.entries)

    async def reclaim(self, min_idle_ms: int, limit: int) -> list[Delivery]:
        """Takes over what was left unacknowledged for `min_idle_ms`; see `Subscription.reclaim`."""
        self._check_open()
        await anyio.lowlevel.checkpoint()
        taken: list[Delivery] = []
        now = self._content.clock.now()
        self._sweep = self._sweep or dict.fromkeys(self.topics, 0)
        for name in list(self._sweep):
            topic, group = self._content.group(name, self._group)
            for number in sorted(n for n in group.pending if n > self._sweep[name]):
                if len(taken) >= limit:
                    return taken
                self._sweep[name] = number
                pending = group.pending[number]
                if now - pending.since >= min_idle_ms * 1000:
                    pending.consumer, pending.since = self._consumer, now
                    pending.attempt += 1
                    taken.append(self._content.delivery(name, topic, number, pending.attempt))
            del self._sweep[name]
        return taken

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Marks entries as done for the group; one that is not pending is no error."""
        await anyio.lowlevel.checkpoint()
        by_topic: defaultdict[str, list[int]] = defaultdict(list)
        for delivery in deliveries:
            by_topic[delivery.topic].append(int(delivery.entry_id))
        for name, numbers in by_topic.items():
            _, group = self._content.group(name, self._group)
            for number in numbers:
                group.pending.pop(number, None)

    async def close(self) -> None:
        """Leaves. What was not acknowledged stays for the other consumers to reclaim."""
        self._closed = True
        self.rouse()

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(
                f"subscription of group {self._group} is closed; expected an open one; join again"
            )
