"""What a user writes by hand: FastStream 0.7.8 consumers, SQLAlchemy 2.1 transactions, an outbox.

Follows faststream.ag2.ai (Redis streams: consumer groups, `max_workers`, acknowledgement after the
handler; uvloop as `faststream run --loop` offers it) and the transactional outbox as it is usually
described: one transaction for each message, publish after its commit, delete the outbox row, then
acknowledge. SQLAlchemy Core instead of mapped objects, since it is faster.

Committed in one transaction for each message: the inbox row, the state row, a history row and the
outbox row; then the outbox row's deletion in another. A command may be published twice (with the same
id) by a crash between; none is lost: what the outbox holds at the start is published first. There is
no reader for messages that another consumer left pending; that would be a second subscriber.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import sqlalchemy as sa
import uvloop
from faststream import AckPolicy, FastStream
from faststream.redis import RedisBroker, RedisStreamMessage, StreamSub
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.peers import PEERS
from benchmarks.peers.bridge import GROUP, STREAM, TOPICS, Settings, command_id, settings

DURABLE = PEERS["faststream"].durable
VERSION_OF = PEERS["faststream"].distribution
STORES = PEERS["faststream"].stores

metadata = sa.MetaData()
sagas = sa.Table(
    "sagas",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)
inbox = sa.Table(
    "inbox",
    metadata,
    sa.Column("message_id", sa.Text, primary_key=True),
    sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
)
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("fields", sa.JSON, nullable=False),
)
history = sa.Table(
    "history",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("message_id", sa.Text, nullable=False),
    sa.Column("at", sa.DateTime(timezone=True), server_default=sa.func.now()),
)

STEPS = {
    "ImportRequested": (None, "authenticating", "AuthenticateUser"),
    "UserAuthenticated": ("authenticating", "generating", "GenerateAccount"),
    "AccountGenerated": ("generating", "done", None),
}
"""Event -> state before, state after, command."""


class Imports:
    """The saga, its tables and its way out."""

    def __init__(self, engine: AsyncEngine, redis: Redis) -> None:
        self.engine, self.redis = engine, redis
        if engine.dialect.name == "sqlite":
            from sqlalchemy.dialects.sqlite import insert
        else:
            from sqlalchemy.dialects.postgresql import insert
        self.seen = insert(inbox).on_conflict_do_nothing().returning(inbox.c.message_id)

    async def prepare(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            left = (await connection.execute(sa.select(outbox))).all()
        for row in left:
            await self.redis.xadd(row.topic, row.fields)
            await self.sent(row.id)

    async def handle(self, fields: dict[bytes, bytes]) -> None:
        """One message: its transaction, then what follows from it. It is acknowledged after that."""
        key = fields[b"correlationid"].decode()
        name = fields[b"type"].decode().removeprefix("bench.")
        body = json.loads(fields[b"data"])
        before, after, command = STEPS[name]
        out = self.command(command, key, body["document"]) if command else None
        async with self.engine.begin() as connection:
            message_id = fields[b"id"].decode()
            if not (await connection.execute(self.seen, {"message_id": message_id})).first():
                return
            version = 1
            state = {"key": key, "state": after, "document": body["document"]}
            if before is None:
                await connection.execute(sa.insert(sagas), {**state, "version": version})
            else:
                query = sa.select(sagas).where(sagas.c.key == key).with_for_update()
                saga = (await connection.execute(query)).one()
                if saga.state != before:
                    raise RuntimeError(f"saga {key} is {saga.state}; {name} needs {before}")
                version = saga.version + 1
                changed = sa.update(sagas).where(sagas.c.key == key)
                await connection.execute(changed.values(**state, version=version))
            if out:
                await connection.execute(sa.insert(outbox), out)
            entry = {"key": key, "version": version, "state": after, "message_id": message_id}
            await connection.execute(sa.insert(history), entry)
        if out:
            await self.redis.xadd(out["topic"], out["fields"])
            await self.sent(out["id"])
        else:
            await self.redis.xadd("bench:finished", {"key": key})

    async def sent(self, identity: str) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(sa.delete(outbox).where(outbox.c.id == identity))

    def command(self, name: str, key: str, document: str) -> dict[str, Any]:
        """A row of the outbox."""
        identity = command_id(name, key)
        fields = {
            "specversion": "1.0",
            "id": identity,
            "type": f"bench.{name}",
            "time": "2026-01-01T00:00:00Z",
            "correlationid": key,
            "data": json.dumps({"import_id": key, "document": document}, separators=(",", ":")),
        }
        return {"id": identity, "topic": TOPICS[name], "fields": fields}


async def entry_fields(message: RedisStreamMessage) -> dict[bytes, bytes]:
    """The producer does not use FastStream's envelope: handlers get the entry as it is."""
    return message.raw_message["data"]


async def serve(given: Settings) -> None:
    url = given.with_drivers("asyncpg", "aiosqlite")
    # One writer at a time queues in the pool; many would poll SQLite's lock.
    pool_size = 1 if given.sqlite else min(given.concurrency, 20)
    engine = create_async_engine(url, pool_size=pool_size, max_overflow=0)
    if given.sqlite:
        begin_immediate(engine)
    imports = Imports(engine, Redis.from_url(given.redis))
    await imports.prepare()
    broker = RedisBroker(given.redis, logger=logging.getLogger("imports"), apply_types=False)
    stream = StreamSub(STREAM, group=GROUP, consumer="peer", max_records=100)
    broker.subscriber(
        stream=stream,
        decoder=entry_fields,
        max_workers=given.concurrency,
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )(imports.handle)
    app = FastStream(broker, logger=logging.getLogger("imports"))

    @app.after_startup
    async def ready() -> None:
        print("ready", flush=True)

    try:
        await app.run()
    finally:
        await imports.redis.aclose()
        await engine.dispose()


def begin_immediate(engine: AsyncEngine) -> None:
    """As SQLAlchemy's documentation of SQLite advises for writers."""

    @sa.event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings()))
