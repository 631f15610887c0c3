"""The limit: the workload on the bare parts, as lean as Python with these parts can be.

The rows and stream entries are those that Sagacity writes, in the same tables, with the same
durability: a batch is one transaction, what it sends is published after the commit, what was
published is deleted from the pending rows by the next batch, and an entry is acknowledged once its
batch is committed. There is no framework: asyncpg or sqlite3, hiredis on one socket, msgspec, and a
dictionary as state machine. It cannot be stopped and started safely, has no retries, no timeouts, no
second worker, no tracing, and knows one workload only.

    python -m benchmarks.bare --store postgresql://... --redis unix:///... --batch 300 [--overlap]

With `--overlap` two batches are under way: one is with the database while the other one is read,
decided and published. Prints "ready" and runs until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import hiredis

from benchmarks.bare_machine import GROUP, TOPICS, Message, Row, Writes
from benchmarks.bare_stores import PostgresqlStore, SqliteStore
from benchmarks.load import Connection
from sagacity.backends.sql import SqlStore

QUIET_MS = 20
"""The group is idle when nothing came for so long: then pending rows are deleted without a batch."""
BLOCK_MS = 500

Settled = tuple[Writes, list[int]]


class AsyncConnection:
    """As `benchmarks.load.Connection`, for a loop that has something else to do meanwhile."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kind = socket.AF_UNIX if parts.scheme == "unix" else socket.AF_INET
        self._socket = socket.socket(kind)
        self._socket.connect(parts.path if kind is socket.AF_UNIX else (parts.hostname, parts.port))
        self._socket.setblocking(False)
        self._reader = hiredis.Reader()

    async def __call__(self, *commands: Row) -> list[Any]:
        """Sends commands; returns their replies. Raises what the server refuses."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, b"".join(map(hiredis.pack_command, commands)))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is False:
                data = await loop.sock_recv(self._socket, 1 << 18)
                if not data:
                    raise ConnectionError("Redis closed the connection")
                self._reader.feed(data)
                continue
            if isinstance(reply, hiredis.ReplyError):
                raise reply
            replies.append(reply)
        return replies


class Keys:
    """Sagas that a batch is at work on: another batch with one of them waits."""

    def __init__(self) -> None:
        self._taken: set[bytes] = set()
        self._freed = asyncio.Event()

    async def take(self, keys: set[bytes]) -> None:
        """Waits until all are free."""
        while not self._taken.isdisjoint(keys):
            self._freed.clear()
            await self._freed.wait()
        self._taken |= keys

    def free(self, keys: set[bytes]) -> None:
        """Lets others have them."""
        self._taken -= keys
        self._freed.set()


class Lane:
    """Reads, settles and publishes one batch after the other."""

    def __init__(self, options: argparse.Namespace, number: int, keys: Keys) -> None:
        self._prefix, self._number, self._keys = options.prefix, number, keys
        self._count = options.batch
        self._streams = [f"{self._prefix}:{topic}" for topic in TOPICS]
        self._published: list[int] = []
        """Numbers of outbox rows that Redis has and the database does not know of."""
        self.stopping = False

    def _read(self, block_ms: int) -> Row:
        return (
            *("XREADGROUP", "GROUP", GROUP, f"bare-{self._number}", "COUNT", self._count),
            *("BLOCK", block_ms, "STREAMS", *self._streams, *(">" for _ in self._streams)),
        )

    def _block_ms(self) -> int:
        return QUIET_MS if self._published else BLOCK_MS

    @staticmethod
    def _messages(reply: Any) -> list[Message]:
        return [
            Message(stream, entry, flat)
            for stream, entries in reply or ()
            for entry, flat in entries
        ]

    @staticmethod
    def _after(messages: Sequence[Message], writes: Writes) -> list[Row]:
        acknowledged: dict[bytes, list[bytes]] = {}
        for message in messages:
            acknowledged.setdefault(message.stream, []).append(message.entry)
        acks = [("XACK", stream, GROUP, *ids) for stream, ids in acknowledged.items()]
        return [*writes.commands, *acks]

    async def alone(self, redis: Connection, store: PostgresqlStore | SqliteStore) -> None:
        """Everything in turn: each write to Redis carries what is published, and the next read."""
        out: list[Row] = []
        numbers: list[int] = []
        while not self.stopping:
            reply = redis(*out, self._read(QUIET_MS if numbers else self._block_ms()))[-1]
            self._published += numbers
            messages = self._messages(reply)
            if not messages:
                out, numbers = [], []
                await self._quiet(store)
                await asyncio.sleep(0)  # signals
                continue
            writes, numbers = await settled(store, messages, self._published)
            self._published = []
            out = self._after(messages, writes)
        if out:
            redis(*out)
            self._published += numbers
        await self._quiet(store)

    async def _quiet(self, store: PostgresqlStore | SqliteStore) -> None:
        published, self._published = self._published, []
        if not published:
            return
        if isinstance(store, SqliteStore):
            store.forget(published)
        else:
            await store.forget(published)

    async def beside(
        self, redis: AsyncConnection, settle: Callable[..., Any], forget: Callable[..., Any]
    ) -> None:
        """The same, but never blocks the loop, and keeps off the sagas of the other lane."""
        out: list[Row] = []
        numbers: list[int] = []
        keys: set[bytes] = set()
        while not self.stopping:
            reply = (await redis(*out, self._read(QUIET_MS if numbers else self._block_ms())))[-1]
            self._published += numbers
            numbers, out = [], []
            messages = self._messages(reply)
            if not messages:
                published, self._published = self._published, []
                if published:
                    await forget(published)
                continue
            keys = {message.saga_key for message in messages}
            await self._keys.take(keys)
            published, self._published = self._published, []
            try:
                writes, numbers = await settle(messages, published)
                await redis(*self._after(messages, writes))
            finally:
                self._keys.free(keys)
        if self._published or numbers:
            await forget(self._published + numbers)


async def settled(
    store: PostgresqlStore | SqliteStore, messages: list[Message], published: list[int]
) -> Settled:
    """Settles on either store; SQLite needs no thread where nothing else is to be done."""
    if isinstance(store, SqliteStore):
        return store.settle(messages, published)
    return await store.settle(messages, published)


async def run(options: argparse.Namespace) -> None:
    """Runs until SIGTERM."""
    kind, _, rest = options.store.partition("://")
    sqlite = kind.startswith("sqlite")
    tables = SqlStore(f"sqlite+aiosqlite://{rest}" if sqlite else f"postgresql+asyncpg://{rest}")
    await tables.prepare(create=True)
    await tables.close()
    setup = Connection(options.redis)
    for topic in TOPICS:
        try:
            setup(("XGROUP", "CREATE", f"{options.prefix}:{topic}", GROUP, "0", "MKSTREAM"))
        except hiredis.ReplyError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
    keys = Keys()
    lanes = [Lane(options, number, keys) for number in range(2 if options.overlap else 1)]

    def stop() -> None:
        for lane in lanes:
            lane.stopping = True

    loop = asyncio.get_running_loop()
    for which in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(which, stop)
    # Rows are many and short-lived, and none is part of a circle.
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000)
    print("ready", flush=True)
    if sqlite:
        store = SqliteStore(rest.removeprefix("/"), options.prefix)
        if not options.overlap:
            await lanes[0].alone(setup, store)
        else:
            with ThreadPoolExecutor(1) as one:
                await asyncio.gather(
                    *(
                        lane.beside(
                            AsyncConnection(options.redis),
                            lambda *given: loop.run_in_executor(one, store.settle, *given),
                            lambda *given: loop.run_in_executor(one, store.forget, *given),
                        )
                        for lane in lanes
                    )
                )
        store.close()
        return
    stores = [PostgresqlStore(f"postgresql://{rest}", options.prefix) for _ in lanes]
    for each in stores:
        await each.open()
    if not options.overlap:
        await lanes[0].alone(setup, stores[0])
    else:
        await asyncio.gather(
            *(
                lane.beside(AsyncConnection(options.redis), each.settle, each.forget)
                for lane, each in zip(lanes, stores, strict=True)
            )
        )
    for each in stores:
        await each.close()


def main() -> None:
    """Runs the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", required=True, help="postgresql://... or sqlite:///path")
    parser.add_argument("--redis", required=True)
    parser.add_argument("--batch", type=int, default=300, help="messages a transaction, at most")
    parser.add_argument("--overlap", action="store_true", help="two batches under way")
    parser.add_argument("--prefix", default="bench")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
