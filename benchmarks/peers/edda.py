"""edda-framework 0.16.2: one workflow of three activities.

Follows i2y.github.io/edda: `EddaApp` on SQLAlchemy storage with its own LISTEN/NOTIFY and uvloop,
which the app installs, the pool size it advises for production. An activity publishes a command and
waits for its reply in memory. That is faster than `wait_event`, after which a background task
resumes workflows one at a time (on SQLite, by polling each second).

Committed: the instance with its input, a lock, then for each activity its result in the history
and the instance's position in one transaction, then the completed status and the lock's release. An
event is acknowledged after the commit that contains it; Edda resumes the workflows of a process
that died when their locks expire, so nothing is lost; a crash within an activity publishes its
command again, with the same id. Edda makes instance ids itself, so an import event delivered twice
starts two workflows. Its transactional outbox publishes CloudEvents by HTTP only, so it is not used.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging

import uvloop
from edda import EddaApp, WorkflowContext, activity, workflow

from benchmarks.peers import PEERS
from benchmarks.peers.bridge import Bridge, Message, Settings, settings, until_terminated

DURABLE = PEERS["edda"].durable
VERSION_OF = PEERS["edda"].distribution
STORES = PEERS["edda"].stores


def define(bridge: Bridge) -> workflow:
    """The workflow, bound to its way out."""

    @activity
    async def authenticate(_: WorkflowContext, key: str, document: str) -> dict[str, str]:
        reply = await bridge.ask("AuthenticateUser", key, document)
        return {"entry": reply.entry.decode(), "document": reply.document}

    @activity
    async def generate(_: WorkflowContext, key: str, document: str) -> dict[str, str]:
        reply = await bridge.ask("GenerateAccount", key, document)
        return {"entry": reply.entry.decode(), "document": reply.document}

    @activity
    async def complete(_: WorkflowContext, key: str, document: str) -> dict[str, str]:
        return {"state": "done", "import_id": key, "document": document}

    @workflow
    async def import_user(
        ctx: WorkflowContext, key: str, document: str, requested: str
    ) -> dict[str, str]:
        bridge.acknowledge(requested.encode())
        reply = await authenticate(ctx, key, document)
        bridge.acknowledge(reply["entry"].encode())
        reply = await generate(ctx, key, reply["document"])
        bridge.acknowledge(reply["entry"].encode())
        return await complete(ctx, key, reply["document"])

    return import_user


async def serve(given: Settings) -> None:
    bridge = await Bridge.open(given.redis)
    import_user = define(bridge)
    app = EddaApp(
        service_name="imports",
        db_url=given.with_drivers("asyncpg", "aiosqlite"),
        pool_size=20,
        max_overflow=0,  # overflow connections are opened anew each time
        pool_pre_ping=False,
    )
    await app.initialize()
    # Each start stores the definition unless it is there; the first ones at once would collide.
    source = inspect.getsource(import_user.func)
    await app.storage.upsert_workflow_definition(
        import_user.name, hashlib.sha256(source.encode()).hexdigest(), source
    )
    limit = asyncio.Semaphore(given.concurrency)

    async def start(message: Message) -> None:
        async with limit:
            await import_user.start(
                key=message.key, document=message.document, requested=message.entry.decode()
            )
        bridge.finished(message.key)

    try:
        await bridge.consume(start)
    finally:
        await app.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(until_terminated(serve(settings())))
