"""What `check` compares, read once: rows of every service, the ledgers, the mails."""

import sqlite3
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Executable, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from examples.batch_import.contexts import tables_of
from examples.batch_import.reading import reading, table_named


class Evidence(msgspec.Struct, frozen=True):
    """Where everything is."""

    stores: Mapping[str, str]
    """Service -> URL of its database."""
    ledgers: Mapping[str, Path]
    """Remote system -> its file."""
    mails: Path
    lag_s: float = 10.0
    """How long a message may wait to be published."""


class Entry(msgspec.Struct, frozen=True):
    """One line of a remote system's ledger."""

    at_us: int
    operation: str
    account: str
    external_ref: str


class Mail(msgspec.Struct, frozen=True):
    """One mail that the sink has accepted."""

    at_us: int
    to: str
    message_id: str
    raw: bytes


class Found:
    """The open databases; each invariant asks for what it needs."""

    def __init__(self, evidence: Evidence, connections: Mapping[str, AsyncConnection]) -> None:
        self.evidence = evidence
        self.connections = connections

    def table(self, service: str, name: str) -> Table:
        """A table of a context."""
        return table_named(tables_of(service), service, name)

    async def rows(self, service: str, statement: Executable) -> list[Any]:
        """The rows of a question to one service's database."""
        return list(await self.connections[service].execute(statement))

    def ledger(self, system: str) -> list[Entry]:
        """Every account that a system made or deleted, oldest first."""
        path = self.evidence.ledgers[system]
        if not path.exists():
            return []
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            rows = db.execute(
                "SELECT at_us, operation, account, external_ref FROM ledger ORDER BY seq"
            )
            return [Entry(*row) for row in rows]

    def mails(self) -> list[Mail]:
        """Every mail that was accepted, oldest first."""
        path = self.evidence.mails
        if not path.exists():
            return []
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT at_us, recipients, message_id, raw FROM mail ORDER BY seq")
            return [
                Mail(at, ",".join(msgspec.json.decode(to)), message_id or "", raw)
                for at, to, message_id, raw in rows
            ]


@asynccontextmanager
async def opened(evidence: Evidence) -> AsyncGenerator[Found]:
    """All databases, each read as of one moment."""
    async with AsyncExitStack() as stack:
        connections = {
            service: await stack.enter_async_context(reading(url))
            for service, url in evidence.stores.items()
        }
        yield Found(evidence, connections)
