"""A connection to Redis on which commands are sent without waiting for the replies before them.

redis-py makes it, for it knows URLs, TLS, passwords and Sentinel. Then its transport gets a protocol
of our own: a client of redis-py takes five times the CPU of the rest for a small command.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

import hiredis
import redis.exceptions as failures
from redis.asyncio.connection import DefaultParser

BUFFER_BYTES = 64 * 1024
"""What is received at a time. Python's own protocols get a new and larger buffer for each time."""
_CLOSE_S = 1.0
"""Longest time that an end may take which says good-bye."""

_CLOSED_HERE = "connection was closed here"

_MORE = object()
"""Says that the rest of a reply is still to come."""
_PUSH: type[list[Any]] | tuple[()] = getattr(hiredis, "PushNotification", ())
"""Replies nobody asked for; RESP3 only, and hiredis knows them from 3.2 on."""
_LAST_WORDS = (failures.ConnectionError, failures.ReadOnlyError)
"""Replies after which redis-py connects anew: not logged in, loading, no primary any more."""

_pack = cast("Callable[[tuple[Any, ...]], bytes]", hiredis.pack_command)


class Line(asyncio.BufferedProtocol):
    """One connection; see `open_line`, and `sagacity.backends.redis.client.Channel`.

    Replies find their commands by order alone, so nothing takes a command out of it: the reply to one
    whose future was cancelled is read and dropped. A server that is silent for the connection's
    ``socket_timeout`` while a reply is due breaks the line: no reply can be waited for by itself.

    What is not sent yet is not bounded here: whoever has many senders waits while `full`.
    """

    def __init__(self, connection: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection  # its stream would close the transport when it goes
        self._transport = cast("asyncio.Transport", connection._writer.transport)  # noqa: SLF001
        self._silence_s: float | None = connection.socket_timeout
        self._received = bytearray(BUFFER_BYTES)
        self._buffer = memoryview(self._received)
        self._reader: Any = hiredis.Reader(
            protocolError=failures.InvalidResponse,
            replyError=cast("Any", DefaultParser).parse_error,
            notEnoughData=_MORE,
        )
        self._due: deque[asyncio.Future[Any]] = deque()
        """Futures of the commands without reply, oldest first."""
        self._heard_at = 0.0
        """When something came, or the first command that is due was sent."""
        self._timer: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        """There while the transport holds more than it should."""
        self._end: tuple[type[failures.RedisError], str] | None = None
        self._gone = self._loop.create_future()
        self._transport.set_protocol(self)

    # --- commands -------------------------------------------------------------------------------

    @property
    def broken(self) -> bool:
        """True once the connection has ended."""
        return self._end is not None

    @property
    def full(self) -> bool:
        """True while the network takes less than was sent."""
        return self._room is not None

    async def room(self) -> None:
        """Waits until the line is not `full`, or broken."""
        if self._room is not None:
            await asyncio.wait({self._room})

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Puts a command in flight; see `Channel.send`.

        At once: to wait for others that would share a system call costs more than the call, for the
        server begins later and whoever waits for it falls asleep.
        """
        reply: asyncio.Future[Any] = self._loop.create_future()
        if self._end is not None:
            kind, text = self._end
            reply.set_exception(kind(text))
            return reply
        packed = _pack(command)
        if not self._due:
            self._heard_at = self._loop.time()
            if self._timer is None and self._silence_s is not None:
                self._timer = self._loop.call_later(self._silence_s, self._look)
        self._due.append(reply)
        self._transport.write(packed)
        return reply

    async def number(self) -> int:
        """See `Channel.number`."""
        return int(await self.send("CLIENT", "ID"))

    async def close(self) -> None:
        """Ends the connection, and fails what is in flight."""
        self._break(failures.ConnectionError, _CLOSED_HERE)
        await asyncio.wait({self._gone}, timeout=_CLOSE_S)
        self._transport.abort()

    def _look(self) -> None:
        """Is the server silent? One timer for all commands, and none for most of them."""
        self._timer = None
        if not self._due or self._silence_s is None:
            return
        at = self._heard_at + self._silence_s
        if at <= self._loop.time():
            self._break(failures.TimeoutError, f"no answer within {self._silence_s:g} s")
            self._transport.abort()
        else:
            self._timer = self._loop.call_at(at, self._look)

    def _break(self, kind: type[failures.RedisError], text: str) -> None:
        if self._end is not None:
            return
        self._end = kind, text
        if self._timer is not None:
            self._timer.cancel()
        due, self._due = self._due, deque()
        for reply in due:
            if not reply.done():
                reply.set_exception(kind(text))
        self.resume_writing()
        self._transport.close()

    # --- asyncio.BufferedProtocol ---------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the transport puts what it receives: always the same place."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Hands each reply that is complete to its command."""
        self._heard_at = self._loop.time()
        try:
            self._reader.feed(self._received, 0, nbytes)
            while self._end is None and (reply := self._reader.gets()) is not _MORE:
                if not isinstance(reply, _PUSH):
                    self._answer(reply)
        except failures.InvalidResponse as error:
            self._break(failures.ConnectionError, f"reply that is no reply: {error}")

    def _answer(self, reply: Any) -> None:
        if not self._due:
            self._break(failures.ConnectionError, "reply that nobody asked for")
            return
        waiter = self._due.popleft()
        if isinstance(reply, Exception):
            if not waiter.done():
                waiter.set_exception(reply)
            if isinstance(reply, _LAST_WORDS):
                self._break(failures.ConnectionError, str(reply))
        elif not waiter.done():
            waiter.set_result(reply)

    def pause_writing(self) -> None:
        """The transport holds enough."""
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        """The transport has got rid of it."""
        self._heard_at = self._loop.time()
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, whoever made it."""
        self._break(failures.ConnectionError, str(exc or "") or "connection closed by server")
        self._connection._reader = self._connection._writer = None  # noqa: SLF001
        if not self._gone.done():
            self._gone.set_result(None)


async def open_line(connection: Any) -> Line:
    """A line over a connection of redis-py that is not connected yet, which nobody else may use.

    Raises what redis-py raises where it cannot connect or log in.
    """
    try:
        await connection.connect()
        # What came beside the answers to the log-in would be taken for answers to what comes next.
        dirty = getattr(connection, "can_read", None) or connection.can_read_destructive
        if await dirty():
            raise failures.ConnectionError("closed, or not in step, after log-in")  # noqa: TRY301
        return Line(connection)
    except BaseException:
        await connection.disconnect(nowait=True)
        raise


class SharedLine:
    """A line for the commands of many tasks, made anew where it broke; see `Client`.

    No command is sent twice. With `opened` making the line.
    """

    def __init__(self, opened: Callable[[], Awaitable[Line]]) -> None:
        self._opened = opened
        self._line: Line | None = None
        self._opening: asyncio.Task[Line] | None = None

    async def execute_command(self, *command: Any, **_: Any) -> Any:
        """Sends one command and returns its reply as Redis sent it.

        Waits before where the network takes less than was sent, so what is held back is what the
        senders of one moment bring. A caller that is cancelled leaves its command in flight.
        """
        line = self._line
        if line is None or line.broken:
            line = await self._open()
        while line.full:
            await line.room()
        return await line.send(*command)

    async def _open(self) -> Line:
        """One attempt for all who wait; it is not cancelled with one of them."""
        opening = self._opening
        if opening is None or opening.done():
            opening = self._opening = asyncio.create_task(
                self._open_once(), name="redis line", context=contextvars.Context()
            )
            opening.add_done_callback(_take_note)
        await asyncio.wait({opening})
        if opening.cancelled():
            raise failures.ConnectionError(_CLOSED_HERE)
        return opening.result()

    async def _open_once(self) -> Line:
        self._line = await self._opened()
        return self._line

    async def aclose(self) -> None:
        """Ends the connection. Safe to call twice."""
        opening = self._opening
        while opening is not None and not opening.done():
            opening.cancel()  # once may not do: before Python 3.12 `asyncio.wait_for` can lose it
            await asyncio.wait({opening}, timeout=_CLOSE_S)
        if self._line is not None:
            await self._line.close()


def _take_note(opening: asyncio.Task[Line]) -> None:
    if not opening.cancelled():
        opening.exception()  # all who waited for it may have been cancelled
