"""A connection whose commands do not wait for each other, against real servers."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

import anyio
import pytest
import redis.exceptions as failures

from sagacity.backends.redis import RedisBus
from sagacity.backends.redis.client import Client, close_client
from sagacity.backends.redis.connection import Connector
from sagacity.backends.redis.embedded import EmbeddedRedis
from sagacity.backends.redis.line import Line, SharedLine
from sagacity.testing.conformance.bus import ids, ids_of, messages, read_all
from tests.servers.proxy import TcpProxy

pytestmark = pytest.mark.asyncio

Command = Callable[..., Awaitable[Any]]
DEADLINE_S = 20.0


@asynccontextmanager
async def client(
    url: str, *, timeout_s: float = 5.0, protocol: Literal[2, 3] = 2
) -> AsyncGenerator[tuple[Connector, Client]]:
    connector = Connector(url, timeout_s=timeout_s, connections_max=4, protocol=protocol)
    shared = connector.shared()
    try:
        yield connector, shared
    finally:
        await close_client(shared)


@asynccontextmanager
async def line_to(
    url: str, *, timeout_s: float = 5.0, protocol: Literal[2, 3] = 2
) -> AsyncGenerator[Line]:
    async with client(url, timeout_s=timeout_s, protocol=protocol) as (connector, shared):
        line = await connector.channel(shared, "k", 0)
        assert isinstance(line, Line)
        try:
            yield line
        finally:
            await line.close()


@asynccontextmanager
async def shared_line_to(url: str, *, timeout_s: float = 5.0) -> AsyncGenerator[SharedLine]:
    async with client(url, timeout_s=timeout_s) as (connector, shared):
        line = connector.pipelined(shared)
        assert isinstance(line, SharedLine)
        try:
            yield line
        finally:
            await line.aclose()


async def outcomes(*replies: asyncio.Future[Any]) -> list[Any]:
    with anyio.fail_after(DEADLINE_S):
        return await asyncio.gather(*replies, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- replies find their commands -------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
async def test_errors_between_good_replies_stay_with_their_commands(
    redis_url: str, protocol: Literal[2, 3]
) -> None:
    async with line_to(redis_url, protocol=protocol) as line:
        got = await outcomes(
            line.send("SET", "k", "text"),
            line.send("LPUSH", "k", 1),
            line.send("ECHO", b"\r\n$1\r\n"),
            line.send("NO-SUCH-COMMAND"),
            line.send("XREADGROUP", "GROUP", "g", "c", "STREAMS", "none", ">"),
            line.send("GET", "nothing"),
            line.send("STRLEN", "k"),
        )
        assert got[0] == b"OK"
        assert str(got[1]).startswith("WRONGTYPE")
        assert got[2] == b"\r\n$1\r\n"
        assert "unknown command" in str(got[3])
        assert str(got[4]).startswith("NOGROUP")
        assert {type(got[place]) for place in (1, 3, 4)} == {failures.ResponseError}
        assert got[5:] == [None, 4]
        assert not line.broken


async def test_error_classes_are_those_of_redis_py(redis_url: str, command: Command) -> None:
    user = ("ACL SETUSER", "reader", "reset", "on", ">pw", "~*", "+@all", "-set")
    await command(redis_url, *user)
    try:
        path = redis_url.removeprefix("unix://")
        async with line_to(f"unix://reader:pw@{path}") as line:
            (got,) = await outcomes(line.send("SET", "k", 1))
            assert type(got) is failures.NoPermissionError
        with pytest.raises(failures.ConnectionError, match="invalid username-password"):
            async with line_to(f"unix://reader:wrong@{path}"):
                pass
    finally:
        await command(redis_url, "ACL DELUSER", "reader")


async def test_cancelled_waiters_leave_the_order_as_it_is(redis_url: str) -> None:
    chance = random.Random(7)
    async with shared_line_to(redis_url) as line:
        for round_ in range(30):
            tasks = [
                asyncio.create_task(line.execute_command("ECHO", f"{round_}-{number}"))
                for number in range(50)
            ]
            for _ in range(round_ % 5):
                await asyncio.sleep(0)
            for task in chance.sample(tasks, 20):
                task.cancel()
            got = await asyncio.gather(*tasks, return_exceptions=True)
            kept = [place for place, one in enumerate(got) if not isinstance(one, BaseException)]
            assert len(kept) >= 30
            assert [got[place] for place in kept] == [f"{round_}-{p}".encode() for p in kept]


async def test_many_commands_in_flight_keep_their_order(redis_url: str) -> None:
    async with line_to(redis_url) as line:
        replies = [line.send("RPUSH", "list", number) for number in range(1000)]
        assert await outcomes(*replies) == list(range(1, 1001))
        assert await line.send("LRANGE", "list", 0, -1) == [b"%d" % n for n in range(1000)]


async def test_large_replies_and_commands(redis_url: str) -> None:
    size = 20 * 1024 * 1024
    value = random.Random(1).randbytes(1024) * (size // 1024)
    async with line_to(redis_url) as line:
        got = await outcomes(
            line.send("ECHO", "before"),
            line.send("SET", "large", value),
            line.send("GET", "large"),
            line.send("ECHO", "between"),
            line.send("GET", "large"),
            line.send("ECHO", "after"),
        )
        assert got[:2] + got[3:4] + got[5:] == [b"before", b"OK", b"between", b"after"]
        assert got[2] == got[4] == value
        await line.send("DEL", "large")


async def test_pushes_are_nobodys_replies(redis_url: str, command: Command) -> None:
    async with line_to(redis_url, protocol=3) as line:
        assert await line.send("CLIENT", "TRACKING", "ON", "BCAST") == b"OK"
        for number in range(20):
            await command(redis_url, "SET", f"k{number}", number)
            assert await line.send("GET", f"k{number}") == b"%d" % number
        got = await outcomes(*(line.send("SET", "own", number) for number in range(20)))
        assert got == [b"OK"] * 20
        assert await line.send("ECHO", "end") == b"end"


async def test_unsolicited_reply_breaks_the_line(redis_url: str) -> None:
    async with line_to(redis_url) as line:
        # Two commands in the place of one: the second reply belongs to nobody.
        reply = line.send("ECHO", "one")
        line._transport.write(b"*2\r\n$4\r\nECHO\r\n$3\r\ntwo\r\n")
        assert await reply == b"one"
        await until(lambda: line.broken)
        with pytest.raises(failures.ConnectionError, match="nobody asked for"):
            await line.send("ECHO", "three")


# --- the connection ends -----------------------------------------------------------------------------


async def test_lost_connection_fails_all_in_flight_and_what_comes_later(
    redis_url: str, command: Command
) -> None:
    async with line_to(redis_url) as line:
        number = await line.number()
        done = line.send("ECHO", "done")
        replies = [line.send("BLPOP", "never", 0), *(line.send("ECHO", n) for n in range(5))]
        assert await done == b"done"
        await command(redis_url, "CLIENT KILL", "ID", number)
        got = await outcomes(*replies)
        assert [type(one) for one in got] == [failures.ConnectionError] * 6
        assert len(set(map(id, got))) == 6  # one of them raised in two tasks would mix their traces
        assert line.broken
        with pytest.raises(failures.ConnectionError):
            await line.send("ECHO", "later")


async def test_shared_line_connects_anew_after_its_server_came_back(
    private_redis: EmbeddedRedis,
) -> None:
    async with shared_line_to(private_redis.url) as line:
        assert await line.execute_command("ECHO", "before") == b"before"
        first = line._line
        blocked = asyncio.create_task(line.execute_command("BLPOP", "never", 0))
        await until(lambda: first is not None and len(first._due) == 1)
        private_redis.kill()
        (got,) = await outcomes(blocked)
        assert isinstance(got, failures.ConnectionError)
        with pytest.raises(failures.ConnectionError):
            await line.execute_command("ECHO", "away")
        private_redis.restart()
        got = await outcomes(
            *(asyncio.create_task(line.execute_command("ECHO", n)) for n in range(9))
        )
        assert got == [b"%d" % n for n in range(9)]
        assert line._line is not first


async def test_connection_that_broke_while_idle_is_replaced_for_senders_and_told_to_readers(
    redis_url: str, command: Command
) -> None:
    async with shared_line_to(redis_url) as shared, line_to(redis_url) as line:
        assert await shared.execute_command("ECHO", 1) == b"1"
        assert await line.send("ECHO", 1) == b"1"
        await command(redis_url, "CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
        await until(lambda: line.broken and shared._line is not None and shared._line.broken)
        assert await shared.execute_command("ECHO", 2) == b"2"
        with pytest.raises(failures.ConnectionError, match="closed by server"):
            await line.send("ECHO", 2)


async def test_silent_server_is_noticed_however_often_it_is_asked(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        shared_line_to(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.4) as line,
    ):
        for _ in range(3):
            assert await line.execute_command("ECHO", "x") == b"x"
        proxy.freeze()
        started = asyncio.get_running_loop().time()
        tasks: list[asyncio.Task[Any]] = []
        while not tasks or not tasks[0].done():
            tasks.append(asyncio.create_task(line.execute_command("ECHO", "y")))
            await asyncio.wait(tasks[:1], timeout=0.05)
        assert 0.3 < asyncio.get_running_loop().time() - started < 5
        got = await outcomes(*tasks[:5])
        assert [type(one) for one in got] == [failures.TimeoutError] * 5
        proxy.thaw()
        await outcomes(*tasks)
        assert await line.execute_command("ECHO", "z") == b"z"


async def test_silence_is_no_trouble_while_no_reply_is_due(redis_url: str) -> None:
    async with line_to(redis_url, timeout_s=0.05) as line:
        assert await line.send("ECHO", 1) == b"1"
        timer = line._timer
        assert timer is not None
        await until(lambda: line._timer is None)  # it looked, and nothing was due
        assert await line.send("ECHO", 2) == b"2"


async def test_answers_in_time_keep_a_busy_line_alive(redis_url: str) -> None:
    async with line_to(redis_url, timeout_s=1.0) as line:
        started = asyncio.get_running_loop().time()
        # The last one is due for longer than a silence may take, but it never is silent for so long.
        replies = [line.send("BLPOP", "never", 0.25) for _ in range(5)]
        assert await outcomes(*replies) == [None] * 5
        assert asyncio.get_running_loop().time() - started > 1.0


@pytest.mark.parametrize("refusal", ["READONLY", "LOADING", "NOAUTH", "MASTERDOWN"])
async def test_server_that_is_no_primary_any_more_is_left(redis_url: str, refusal: str) -> None:
    fail = f"return redis.error_reply('{refusal} for a test')"
    async with shared_line_to(redis_url) as line:
        assert await line.execute_command("ECHO", 1) == b"1"
        first = line._line
        with pytest.raises(failures.RedisError, match="for a test"):
            await line.execute_command("EVAL", fail, 0)
        assert await line.execute_command("ECHO", 2) == b"2"
        assert (line._line is first) == (refusal == "MASTERDOWN")


# --- many senders ------------------------------------------------------------------------------------


async def test_senders_wait_while_the_network_takes_nothing(redis_url: str) -> None:
    body = b"x" * 1_000_000
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        shared_line_to(f"redis://127.0.0.1:{proxy.port}") as line,
    ):
        assert await line.execute_command("ECHO", "x") == b"x"
        connected = line._line
        assert connected is not None
        proxy.freeze()
        tasks: list[asyncio.Task[Any]] = []
        while not connected.full:
            tasks.append(asyncio.create_task(line.execute_command("ECHO", body)))
            await asyncio.sleep(0)
        held = connected._transport.get_write_buffer_size()
        tasks += [asyncio.create_task(line.execute_command("ECHO", body)) for _ in range(50)]
        await anyio.wait_all_tasks_blocked()
        assert connected._transport.get_write_buffer_size() <= held
        proxy.thaw()
        assert {len(one) for one in await outcomes(*tasks)} == {len(body)}


async def test_senders_that_wait_hear_of_the_end(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        shared_line_to(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.4) as line,
    ):
        assert await line.execute_command("ECHO", "x") == b"x"
        connected = line._line
        assert connected is not None
        proxy.freeze()
        tasks = [
            asyncio.create_task(line.execute_command("ECHO", b"x" * 5_000_000)) for _ in range(2)
        ]
        await until(lambda: connected.full)
        tasks += [asyncio.create_task(line.execute_command("ECHO", "x")) for _ in range(5)]
        got = await outcomes(*tasks)
        kinds = (failures.TimeoutError, failures.ConnectionError)
        assert all(isinstance(one, kinds) for one in got), got


async def test_one_attempt_to_connect_serves_all_and_outlives_its_first_caller(
    redis_url: str,
) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        shared_line_to(f"redis://127.0.0.1:{proxy.port}") as line,
    ):
        proxy.freeze()
        tasks = [asyncio.create_task(line.execute_command("ECHO", n)) for n in range(10)]
        await anyio.wait_all_tasks_blocked()
        tasks[0].cancel()
        proxy.thaw()
        got = await outcomes(*tasks)
        assert got[1:] == [b"%d" % n for n in range(1, 10)]
        assert proxy.accepted == 1


async def test_closing_fails_what_is_in_flight_and_can_be_done_twice(redis_url: str) -> None:
    async with shared_line_to(redis_url) as line:
        blocked = asyncio.create_task(line.execute_command("BLPOP", "never", 0))
        await until(lambda: line._line is not None and len(line._line._due) == 1)
        await line.aclose()
        await line.aclose()
        with pytest.raises(failures.ConnectionError, match="closed here"):
            await blocked


async def test_closing_while_it_connects_is_told_to_those_who_wait(redis_url: str) -> None:
    async with (
        TcpProxy(redis_url.removeprefix("unix://")) as proxy,
        shared_line_to(f"redis://127.0.0.1:{proxy.port}") as line,
    ):
        proxy.freeze()
        task = asyncio.create_task(line.execute_command("ECHO", 1))
        await until(lambda: proxy.accepted == 1)
        await line.aclose()
        with pytest.raises(failures.ConnectionError, match="closed here"):
            await task


# --- connections of every kind -----------------------------------------------------------------------


@asynccontextmanager
async def tls_before(path: str) -> AsyncGenerator[int]:
    """A port that speaks TLS and passes on to a unix socket. Without a certificate: no secrets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, upstream[1]), pump(upstream[0], writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_bus_over_tls(redis_url: str) -> None:
    options = "ssl_cert_reqs=none&ssl_check_hostname=False&ssl_ciphers=aNULL%3A%40SECLEVEL%3D0"
    async with (
        tls_before(redis_url.removeprefix("unix://")) as port,
        RedisBus(f"rediss://127.0.0.1:{port}/0?{options}", payload_bytes_max=9_000_000) as bus,
    ):
        subscription = await bus.join("g", "c", ["orders"])
        await bus.publish(messages(100))
        found = await read_all(subscription, 100)
        assert ids(found) == ids_of(messages(100))
        await subscription.ack(found)
        line = cast("SharedLine", bus._pipelined)
        value = random.Random(2).randbytes(3_000_000)
        assert await line.execute_command("ECHO", value) == value


async def test_database_and_name_of_the_url_hold_on_a_line(redis_url: str) -> None:
    async with line_to(f"{redis_url}?db=3&client_name=worker-7") as line:
        facts = (await line.send("CLIENT", "LIST", "ID", await line.number())).decode()
        assert " db=3 " in facts
        assert " name=worker-7 " in facts
