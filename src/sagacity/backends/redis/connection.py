"""Connections to Redis: one server, TLS, a unix socket, Sentinel or Cluster, chosen by the URL.

The client never retries on its own: a retried XADD is a second entry, and a retried XREADGROUP
leaves what the first one was given to a consumer that has forgotten it (libraries.md 4).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import redis.exceptions as failures
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer

from sagacity.backends.redis.client import Channel, Client, ClientChannel
from sagacity.backends.redis.line import Line, SharedLine, open_line
from sagacity.core.errors import BusError, BusUnavailable, ConfigurationError

_PLAIN = ("redis", "rediss", "unix")
_SENTINEL = ("redis+sentinel", "rediss+sentinel")
_CLUSTER = ("redis+cluster", "rediss+cluster")
SCHEMES = (*_PLAIN, *_SENTINEL, *_CLUSTER)

_SECRET_OPTIONS = ("password", "username")

_FORBIDDEN = (
    failures.AuthenticationError,
    failures.AuthorizationError,
    failures.NoPermissionError,
)
_TRANSIENT = (
    failures.ConnectionError,
    failures.TimeoutError,
    failures.ReadOnlyError,
    failures.OutOfMemoryError,
    failures.ClusterDownError,
    failures.TryAgainError,
    failures.AskError,
    failures.SlotNotCoveredError,
    OSError,
)
_TRANSIENT_WORDS = (
    "OOM ",
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "MISCONF",
    "BUSY ",
    "UNBLOCKED",
    "NOGROUP",
)
"""First words of replies that mean: not now."""


def redacted(url: str) -> str:
    """`url` without user name, password and secret options, for logs and errors."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    user, at, place = parts.netloc.rpartition("@")
    query = urlencode(
        [
            (name, "***" if name.endswith(_SECRET_OPTIONS) else value)
            for name, value in parse_qsl(parts.query)
        ],
        safe="*/",
    )
    netloc = f"***@{place}" if user or at else place
    return f"{parts.scheme}://{netloc}{parts.path}{'?' if query else ''}{query}"


class Connector:
    """Makes clients for one URL.

    ``redis://``, ``rediss://`` and ``unix://`` are redis-py's own. ``redis+sentinel://host:26379,
    host2:26379/service/0`` asks Sentinel for the master. ``redis+cluster://host:7000`` learns the
    other nodes from the named one. The ``rediss+`` forms use TLS. Raises ConfigurationError for
    anything else.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connections_max: int,
        protocol: Literal[2, 3],
    ) -> None:
        self.name = redacted(url)
        self._url = url
        try:
            self._parts = urlsplit(url)
        except ValueError as error:
            raise ConfigurationError(f"bus URL: {error}") from error
        self._timeout_s = timeout_s
        self._connections_max = connections_max
        self._protocol = protocol
        if self._parts.scheme not in SCHEMES:
            raise ConfigurationError(
                f"bus URL {self.name}: expected one of {', '.join(f'{s}://' for s in SCHEMES)}, "
                f"got {self._parts.scheme or 'no scheme'!r}"
            )
        self.cluster = self._parts.scheme in _CLUSTER
        """True where each stream may live on another node."""

    def shared(self) -> Client:
        """A client for short commands from many tasks; waits for a free connection."""
        return self._client(self._timeout_s, self._connections_max)

    def pipelined(self, shared: Client) -> Client:
        """A client for the commands of every batch, all on one connection; replies as Redis sent them.

        In a cluster it is the shared one.
        """
        if not self._has_lines:
            return shared
        return SharedLine(lambda: _line(shared, 0))

    async def channel(self, shared: Client, key: str, block_ms: int) -> Channel:
        """A connection for commands on `key` that may block for `block_ms`.

        Raises what redis-py raises where the server cannot be reached.
        """
        if not self._has_lines:
            return ClientChannel(self.dedicated(block_ms), key)
        return await _line(shared, block_ms)

    def dedicated(self, block_ms: int) -> Client:
        """A client with one connection of its own, whose commands may block for `block_ms`.

        It tells each broken connection by an error, as a channel has to. Close it with `close_client`.
        """
        return self._client(self._timeout_s + block_ms / 1000, None)

    @property
    def _has_lines(self) -> bool:
        return not self.cluster

    def _client(self, read_timeout_s: float, connections: int | None) -> Client:
        client = self._connected_by(read_timeout_s, connections)
        for command in ("XREADGROUP", "XAUTOCLAIM"):
            client.set_response_callback(command, _as_sent)
        return cast("Client", client)

    def _connected_by(self, read_timeout_s: float, connections: int | None) -> Any:
        scheme = self._parts.scheme
        options: dict[str, Any] = {
            "decode_responses": False,
            "protocol": self._protocol,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": read_timeout_s,
        }
        if scheme != "unix":
            options["socket_connect_timeout"] = self._timeout_s
            options["socket_keepalive"] = True
        try:
            if scheme in _CLUSTER:
                return self._cluster(options)
            if scheme in _SENTINEL:
                pool = self._sentinel_pool(options)
            elif connections is None:
                pool = ConnectionPool.from_url(self._url, **options)
            else:
                pool = BlockingConnectionPool.from_url(
                    self._url, max_connections=connections, timeout=self._timeout_s, **options
                )
            pool.connection_class = _packing(cast("Any", pool.connection_class))
            # Names an unknown option now, not with the first command.
            pool.connection_class(**pool.connection_kwargs)
            if connections is None:
                return Redis(connection_pool=pool, single_connection_client=True)
            return Redis.from_pool(pool)  # closing the client closes the pool
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"bus URL {self.name}: {_one_line(str(error))}") from error

    def _sentinel_pool(self, options: dict[str, Any]) -> ConnectionPool:
        parts = self._parts
        _, _, places = parts.netloc.rpartition("@")
        service, _, database = parts.path.strip("/").partition("/")
        if not service:
            raise ConfigurationError(
                f"bus URL {self.name}: expected the service name as path, such as "
                "redis+sentinel://host:26379/mymaster/0"
            )
        hosts = []
        for place in places.split(","):
            host, _, port = place.rpartition(":") if ":" in place else (place, "", "26379")
            hosts.append((host.strip("[]"), int(port)))
        extra: dict[str, Any] = dict(parse_qsl(parts.query))
        sentinel_options = {
            "socket_timeout": self._timeout_s,
            "socket_connect_timeout": self._timeout_s,
            "retry": Retry(NoBackoff(), 0),
            **{
                name.removeprefix("sentinel_"): extra.pop(name)
                for name in list(extra)
                if name.startswith("sentinel_")
            },
        }
        if parts.scheme == "rediss+sentinel":
            options["ssl"] = True
        sentinel: Any = cast("Any", Sentinel)(hosts, sentinel_kwargs=sentinel_options)
        pool: Any = cast("Any", SentinelConnectionPool)(
            service,
            sentinel,
            username=_user(parts.username),
            password=_user(parts.password),
            db=int(database or 0),
            **extra,
            **options,
        )
        return cast("ConnectionPool", pool)

    def _cluster(self, options: dict[str, Any]) -> Any:
        parts = self._parts
        plain = urlunsplit(
            (parts.scheme.removesuffix("+cluster"), parts.netloc, "", parts.query, "")
        )
        return RedisCluster.from_url(plain, **options)

    # --- errors ---------------------------------------------------------------------------------

    @contextmanager
    def errors(self, what: str) -> Generator[None]:
        """Turns what redis-py raises into BusUnavailable or BusError, in one line, no secrets."""
        try:
            yield
        except (failures.RedisError, OSError) as error:
            raise self.error(error, what) from error

    def error(self, error: BaseException, what: str) -> BusError:
        """The error of ours for one of redis-py's."""
        reason = reason_of(error)
        # redis-py says ConnectionError for a connection that was refused for its password.
        if isinstance(error, _FORBIDDEN) or isinstance(error.__cause__, _FORBIDDEN):
            return BusError(
                f"Redis at {self.name} refused to {what}: {reason}; expected a user who may; check the "
                "user name, the password and the ACL"
            )
        if isinstance(error, _TRANSIENT) or reason.startswith(_TRANSIENT_WORDS):
            return BusUnavailable(
                f"Redis at {self.name} is not available to {what}: {reason}; it is tried again, "
                "otherwise check the server and the URL"
            )
        return BusError(f"Redis at {self.name} refused to {what}: {reason}")


def reason_of(error: BaseException) -> str:
    """The text of an error of redis-py in one line."""
    text = str(error)
    if isinstance(error, failures.OutOfMemoryError):
        text = f"OOM {text}"  # redis-py leaves the first word out
    return _one_line(text) or type(error).__name__


def missing_group(error: BaseException) -> bool:
    """True where the stream or the group has gone: flushed, deleted, or lost with its server."""
    return isinstance(error, failures.ResponseError) and reason_of(error).startswith(
        ("NOGROUP", "UNBLOCKED")
    )


async def _line(shared: Client, block_ms: int) -> Line:
    """A line to where the client's connections go, also where Sentinel names the place."""
    connection: Any = cast("Any", shared).connection_pool.make_connection()
    if connection.socket_timeout is not None:
        connection.socket_timeout += block_ms / 1000
    return await open_line(connection)


@cache
def _packing(kind: Any) -> Any:
    """Connections of `kind` that pack commands with hiredis, as redis-py does where it is not async."""
    packer = HiredisRespSerializer()

    def pack_command(_: object, *args: Any) -> list[bytes]:
        return cast("list[bytes]", packer.pack(*args))

    return type(kind.__name__, (kind,), {"pack_command": pack_command})


def _as_sent(reply: Any, **_: Any) -> Any:
    """Entries as Redis sent them: `sagacity.backends.redis.entry` reads them in one pass."""
    return reply


def _user(value: str | None) -> str | None:
    return unquote(value) if value else None


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
