"""Opens the store and the bus that URLs name, and waits until they can be reached.

Drivers are imported here and nowhere earlier, so a missing one is told in one line with the command
that installs it. A server that is away is no error: it is waited for, with one log line when it goes
and one when it comes back (``protocol.md`` row 37).
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar
from urllib.parse import unquote

import anyio

from sagacity.core.errors import BusUnavailable, ConfigurationError, Unavailable
from sagacity.ports import (
    Bus,
    BusMemory,
    BusUpkeep,
    Inspector,
    MarkStore,
    OutboxStore,
    RetentionStore,
    Store,
    TaskStore,
)
from sagacity.service import Service
from sagacity.worker.redaction import redacted

__all__ = [
    "WholeBus",
    "WholeStore",
    "full_store_url",
    "is_new",
    "open_bus",
    "open_store",
    "until_reachable",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY: Final = "memory:"
_SQL_DRIVERS: Final = {
    # scheme: (modules, one of which is enough, with the scheme that uses it; what installs it)
    "sqlite": ((("aiosqlite", "sqlite+aiosqlite"),), "sagacity"),
    "sqlite+aiosqlite": ((("aiosqlite", "sqlite+aiosqlite"),), "sagacity"),
    "postgresql": (
        (("asyncpg", "postgresql+asyncpg"), ("psycopg", "postgresql+psycopg")),
        "sagacity[postgres]",
    ),
    "postgresql+asyncpg": ((("asyncpg", "postgresql+asyncpg"),), "sagacity[postgres]"),
    "postgresql+psycopg": ((("psycopg", "postgresql+psycopg"),), "sagacity[psycopg]"),
}
_SCHEME_ALIASES: Final = {"postgres": "postgresql"}
_BUS_SCHEMES: Final = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 10.0


class WholeStore(Store, OutboxStore, TaskStore, RetentionStore, MarkStore, Inspector, Protocol):
    """A store with all its views, as every backend of this package is."""


class WholeBus(Bus, BusMemory, BusUpkeep, Protocol):
    """A bus with all its views, as every backend of this package is."""


def open_store(url: str, *, service: Service | None = None) -> WholeStore:
    """The store that `url` names; nothing is connected yet.

    ``sqlite+aiosqlite:///file.db``, ``postgresql+asyncpg://...``, ``postgresql+psycopg://...`` or
    ``memory:``; without a driver name the one that is installed is taken. With `service` the sessions
    of its participants publish what entities record, and call its subscribers of this process. Raises
    ConfigurationError for any other URL, and for a missing driver.
    """
    if url == MEMORY:
        from sagacity.backends.memory import MemoryStore

        return MemoryStore()
    url = full_store_url(url)
    from sagacity.backends.sql import SqlStore

    if service is None:
        return SqlStore(url)
    from sagacity.backends.sql.session import SagaSession, recording_of

    recording = recording_of(service)
    return SqlStore(
        url,
        session_factory=lambda engine: SagaSession(
            engine, recording=recording, expire_on_commit=False
        ),
    )


def open_bus(url: str, *, prefix: str = "sagacity", payload_bytes_max: int = 262_144) -> WholeBus:
    """The bus that `url` names; nothing is connected yet.

    ``redis://``, ``rediss://`` (TLS), ``unix://`` or ``memory:``. Raises ConfigurationError for any
    other URL.
    """
    if url == MEMORY:
        from sagacity.backends.memory import MemoryBus

        return MemoryBus(payload_bytes_max=payload_bytes_max)
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in _BUS_SCHEMES:
        raise ConfigurationError(
            f"--bus (SAGACITY_BUS): expected redis://, rediss:// or unix://, or memory:, "
            f"got {redacted(url)}"
        )
    from sagacity.backends.redis import RedisBus

    try:
        return RedisBus(url, prefix=prefix, payload_bytes_max=payload_bytes_max)
    except ValueError:
        # The text of the driver may hold the URL as it is, so neither is it shown nor chained.
        raise ConfigurationError(
            f"--bus (SAGACITY_BUS): expected a URL such as redis://user:password@host:6379/0, "
            f"got {redacted(url)}; characters such as @ : / # in a password are written as %XX"
        ) from None


def full_store_url(url: str) -> str:
    """`url` with its driver; raises ConfigurationError where it is malformed or not installed."""
    scheme, separator, rest = url.partition("://")
    scheme = _SCHEME_ALIASES.get(scheme, scheme)
    if not separator or scheme not in _SQL_DRIVERS:
        raise ConfigurationError(
            "--store (SAGACITY_STORE): expected sqlite+aiosqlite://, postgresql+asyncpg:// or "
            f"postgresql+psycopg://, or memory:, got {redacted(url)}"
        )
    drivers, package = _SQL_DRIVERS[scheme]
    found = [full for module, full in drivers if importlib.util.find_spec(module) is not None]
    if not found:
        names = " or ".join(module for module, _ in drivers)
        raise ConfigurationError(
            f"--store (SAGACITY_STORE): {redacted(url)} needs {names}, which is not installed; "
            f"run: pip install '{package}'"
        )
    full = f"{found[0]}://{rest}"
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(full)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "--store (SAGACITY_STORE): expected a URL such as "
            f"postgresql+asyncpg://user:password@host:5432/database, got {redacted(url)}; "
            "characters such as @ : / # in a password are written as %XX"
        ) from None
    return full


def is_new(url: str) -> bool:
    """True for a store that nobody can have used yet: memory, and an SQLite file still to be made.

    Its tables are created without being asked for; anywhere else that is an operator's decision.
    """
    if url == MEMORY:
        return True
    scheme, _, rest = url.partition("://")
    if not scheme.startswith("sqlite"):
        return False
    path = unquote(rest.partition("?")[0].removeprefix("/"))
    if path in {"", ":memory:"}:
        return True
    try:
        return Path(path).stat().st_size == 0
    except OSError:
        return True


async def until_reachable(
    name: str, where: str, attempt: Callable[[], Awaitable[T]], *, stopping: anyio.Event
) -> T | None:
    """What `attempt` returns once its server can be reached; None where `stopping` came first.

    `name` (``store`` or ``bus``) and `where` (a redacted URL) are for the log. Only Unavailable and
    BusUnavailable are waited out, with growing, jittered pauses; other errors are raised.
    """
    result: T | None = None
    failure: Exception | None = None

    async def attempts() -> None:
        nonlocal result, failure
        try:
            result = await _attempts(name, where, attempt)
        except Exception as error:  # noqa: BLE001 - raised below, outside of any exception group
            failure = error
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(attempts)
        await stopping.wait()
        group.cancel_scope.cancel()  # an attempt may hang for as long as TCP likes
    if failure is not None:
        raise failure
    return result


async def _attempts(name: str, where: str, attempt: Callable[[], Awaitable[T]]) -> T:
    wait = _FIRST_WAIT_S
    failed = 0
    while True:
        try:
            result = await attempt()
        except (Unavailable, BusUnavailable) as error:
            failed += 1
            if failed == 1:
                log.warning(
                    "Server unreachable, waiting for it",
                    extra={"server": name, "url": where, "error": _first_line(error)},
                )
            await anyio.sleep(random.uniform(wait / 2, wait))
            wait = min(2 * wait, _LONGEST_WAIT_S)
        else:
            if failed:
                log.info(
                    "Server reached", extra={"server": name, "url": where, "attempts": failed + 1}
                )
            return result


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
