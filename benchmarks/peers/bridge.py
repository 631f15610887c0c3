"""Redis Streams for peers that bring no messaging of their own: as lean as the load itself.

One connection reads `bench:imports` as a consumer group, another writes. What is written in one turn
of the event loop leaves in one write. A message stays pending until `acknowledge`, so that a
crash before it delivers it again; commands have ids that a second try repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import signal
import sqlite3
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import hiredis

PR_SET_PDEATHSIG = 1
STREAM = "bench:imports"
GROUP = "imports"
TOPICS = {"AuthenticateUser": "bench:auth", "GenerateAccount": "bench:accounts"}


@dataclass(frozen=True, slots=True)
class Message:
    """An event of the stream."""

    entry: bytes
    id: str
    name: str
    key: str
    """Of the saga."""
    in_reply_to: str
    document: str


def command_id(name: str, key: str) -> str:
    """The same at every try, so that participants can tell repeated commands."""
    return f"{name}:{key}"


class Connection(asyncio.Protocol):
    """RESP over one socket; replies come in the order of the commands."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport

    @classmethod
    async def open(cls, url: str) -> Connection:
        parts, loop = urlsplit(url), asyncio.get_running_loop()
        if parts.scheme == "unix":
            _, connection = await loop.create_unix_connection(cls, parts.path)
        else:
            _, connection = await loop.create_connection(cls, parts.hostname, parts.port)
        return connection

    def __call__(self, *command: Any) -> asyncio.Future[Any]:
        """Sends a command at the end of this turn of the loop; the future is its reply."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(hiredis.pack_command(command))
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append(future)
        return future

    def _flush(self) -> None:
        self._transport.write(b"".join(self._out))
        self._out.clear()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            future = self._waiting.popleft()
            if future.cancelled():
                continue
            if isinstance(reply, hiredis.ReplyError):
                future.set_exception(reply)
            else:
                future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(exc or ConnectionError("Redis closed the connection"))


class Bridge:
    """Events in, commands out, replies to whoever asked."""

    def __init__(self, reader: Connection, writer: Connection) -> None:
        self._reader, self._writer = reader, writer
        self._asked: dict[str, asyncio.Future[Message]] = {}

    @classmethod
    async def open(cls, url: str) -> Bridge:
        return cls(await Connection.open(url), await Connection.open(url))

    async def consume(
        self,
        start: Callable[[Message], Awaitable[None]],
        reply: Callable[[Message], Awaitable[None]] | None = None,
    ) -> None:
        """Hands every event to a task of its own; without `reply`, replies go to who asked.

        What an earlier process left pending comes first. Ends with the first error of a task.
        """
        try:
            await self._writer("XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM")
        except hiredis.ReplyError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        read = ("XREADGROUP", "GROUP", GROUP, "peer", "COUNT", 1000, "BLOCK", 0, "STREAMS", STREAM)
        print("ready", flush=True)
        async with asyncio.TaskGroup() as tasks:
            place = "0"
            while True:
                for _, entries in await self._reader(*read, place) or ():
                    for entry, flat in entries:
                        message = _message(entry, flat)
                        handle = reply if message.in_reply_to else start
                        if handle is not None:
                            tasks.create_task(_run(handle, message))
                        else:
                            self._answer(message)
                    # From the last pending entry on to the next ones, then new ones only.
                    place = ">" if place == ">" or not entries else entries[-1][0]

    def publish(self, name: str, key: str, document: str) -> asyncio.Future[Any]:
        """Writes a command; the future is done when Redis has it."""
        body = json.dumps({"import_id": key, "document": document}, separators=(",", ":"))
        return self._writer(
            *("XADD", TOPICS[name], "*", "specversion", "1.0", "id", command_id(name, key)),
            *("type", f"bench.{name}", "time", "2026-01-01T00:00:00Z"),
            *("correlationid", key, "data", body),
        )

    async def ask(self, name: str, key: str, document: str) -> Message:
        """Publishes a command; returns the event that answers it, not yet acknowledged."""
        asked = command_id(name, key)
        answer = self._answer_to(asked)
        try:
            await self.publish(name, key, document)
            return await answer
        finally:
            del self._asked[asked]

    def acknowledge(self, entry: bytes) -> None:
        """The event's effect is committed."""
        self._writer("XACK", STREAM, GROUP, entry)

    def finished(self, key: str) -> None:
        """The saga is over, and what it did is committed."""
        self._writer("XADD", "bench:finished", "*", "key", key)

    def _answer_to(self, asked: str) -> asyncio.Future[Message]:
        if asked not in self._asked:
            self._asked[asked] = asyncio.get_running_loop().create_future()
        return self._asked[asked]

    def _answer(self, message: Message) -> None:
        # After a restart the answer may come before the recovered saga asks again.
        answer = self._answer_to(message.in_reply_to)
        if not answer.done():
            answer.set_result(message)


async def _run(handle: Callable[[Message], Awaitable[None]], message: Message) -> None:
    await handle(message)


def _message(entry: bytes, flat: list[bytes]) -> Message:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return Message(
        entry=entry,
        id=fields[b"id"].decode(),
        name=fields[b"type"].decode().removeprefix("bench."),
        key=fields[b"correlationid"].decode(),
        in_reply_to=fields.get(b"inreplyto", b"").decode(),
        document=json.loads(fields[b"data"])["document"],
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """What every peer is started with."""

    store: str
    redis: str
    concurrency: int

    @property
    def sqlite(self) -> bool:
        return self.store.startswith("sqlite")

    def prepare(self) -> None:
        """Gives SQLite a write-ahead log, which stays: one sync a commit, readers do not wait."""
        if self.sqlite:
            with closing(sqlite3.connect(self.store.removeprefix("sqlite:///"))) as connection:
                connection.execute("PRAGMA journal_mode=WAL")

    def with_drivers(self, postgresql: str, sqlite: str) -> str:
        """The store's URL with a driver of SQLAlchemy named."""
        scheme, _, rest = self.store.partition("://")
        return f"{scheme}+{sqlite if self.sqlite else postgresql}://{rest}"


def settings() -> Settings:
    """Of the command line. From here on, the process dies with the one that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True, help="postgresql://... or sqlite:///path")
    parser.add_argument("--redis", required=True, help="unix:///... or redis://host:port")
    parser.add_argument("--concurrency", type=int, default=50, help="sagas or tasks under way")
    given = Settings(**vars(parser.parse_args()))
    given.prepare()
    return given


async def until_terminated(work: Awaitable[None]) -> None:
    """Runs to the end of `work`, or until SIGTERM or SIGINT ends it."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return
