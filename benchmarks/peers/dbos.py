"""DBOS Transact 3.4.0 for Python: one asynchronous workflow of three steps.

Follows docs.dbos.dev/python: workflows and steps as coroutines (tutorials/workflow-tutorial), the
workflow's id as idempotency key, started directly and not through a queue, whose workers poll.
A step publishes a command and waits for its reply in memory; the reply is the step's recorded
output. `DBOS.send` and `DBOS.recv` would add a row and two transactions to each reply.

Committed: the workflow's row with its input before the first step, then each step's output, then
the workflow's result. An event is acknowledged after the commit that contains it, and DBOS
recovers workflows at start, so nothing is lost (recovered sagas are not announced); a crash within
a step publishes its command again, with the same id. No history of states beyond the steps'
outputs, and no outbox.
"""

from __future__ import annotations

import asyncio
import logging

from dbos import DBOS, DBOSConfig, SetWorkflowID

from benchmarks.peers import PEERS
from benchmarks.peers.bridge import Bridge, Message, Settings, settings, until_terminated

DURABLE = PEERS["dbos"].durable
VERSION_OF = PEERS["dbos"].distribution
STORES = PEERS["dbos"].stores


def define(bridge: Bridge) -> type:
    """The workflow, bound to its way out."""

    class ImportUser:
        @staticmethod
        @DBOS.step()
        async def authenticate(key: str, document: str) -> tuple[str, str]:
            reply = await bridge.ask("AuthenticateUser", key, document)
            return reply.entry.decode(), reply.document

        @staticmethod
        @DBOS.step()
        async def generate(key: str, document: str) -> tuple[str, str]:
            reply = await bridge.ask("GenerateAccount", key, document)
            return reply.entry.decode(), reply.document

        @staticmethod
        @DBOS.step()
        async def complete(key: str, document: str) -> dict[str, str]:
            return {"state": "done", "import_id": key, "document": document}

        @staticmethod
        @DBOS.workflow()
        async def run(key: str, document: str, requested: str) -> dict[str, str]:
            bridge.acknowledge(requested.encode())
            entry, document = await ImportUser.authenticate(key, document)
            bridge.acknowledge(entry.encode())
            entry, document = await ImportUser.generate(key, document)
            bridge.acknowledge(entry.encode())
            return await ImportUser.complete(key, document)

    return ImportUser


async def serve(given: Settings) -> None:
    bridge = await Bridge.open(given.redis)
    config: DBOSConfig = {
        "name": "imports",
        "system_database_url": given.store,
        "sys_db_pool_size": 20,
        "max_executor_threads": 20,
        "log_level": "WARNING",
    }
    DBOS(config=config)
    workflow = define(bridge)
    DBOS.launch()
    limit = asyncio.Semaphore(given.concurrency)

    async def start(message: Message) -> None:
        async with limit:
            with SetWorkflowID(message.key):
                await workflow.run(message.key, message.document, message.entry.decode())
        bridge.finished(message.key)

    try:
        await bridge.consume(start)
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(until_terminated(serve(settings())))
