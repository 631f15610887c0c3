"""python-cqrs 5.3.0: a saga of three steps, run by its mediator, with SQLAlchemy saga storage.

Follows the project's documentation of sagas (Saga, SagaStepHandler, bootstrap) with
`SqlAlchemySagaStorage`, which commits at checkpoints: one session for a saga, one commit after
each step. A step publishes a command and waits for its reply in memory.

Committed: the saga's row with its context, its status, then context and log entries with each
step, then the completed status. An event is acknowledged after the commit that contains it. After a
crash the application has to call `recover_saga` for unfinished sagas (not part of this peer); it
runs the interrupted step again, so its command may be published again, with the same id. No inbox and
no outbox here: the library's outbox is for commands of one service and is not tied to saga steps.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass
from typing import ClassVar

import di
from cqrs import Response, SagaMap
from cqrs.bootstrap.saga import bootstrap
from cqrs.handlers.saga import SagaStepHandler, SagaStepResult
from cqrs.saga.models import SagaContext
from cqrs.saga.saga import Saga
from cqrs.saga.storage.sqlalchemy import Base, SqlAlchemySagaStorage
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.peers import PEERS
from benchmarks.peers.bridge import Bridge, Message, Settings, settings, until_terminated

DURABLE = PEERS["python_cqrs"].durable
VERSION_OF = PEERS["python_cqrs"].distribution
STORES = PEERS["python_cqrs"].stores


@dataclass
class Import(SagaContext):
    import_id: str
    document: str
    state: str = "requested"
    entry: str = ""


class Authenticate(SagaStepHandler[Import, Response]):
    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    async def act(self, context: Import) -> SagaStepResult[Import, Response]:
        reply = await self.bridge.ask("AuthenticateUser", context.import_id, context.document)
        context.state, context.document = "authenticated", reply.document
        context.entry = reply.entry.decode()
        return self._generate_step_result(Response())

    async def compensate(self, context: Import) -> None: ...


class Generate(SagaStepHandler[Import, Response]):
    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    async def act(self, context: Import) -> SagaStepResult[Import, Response]:
        reply = await self.bridge.ask("GenerateAccount", context.import_id, context.document)
        context.state, context.document = "generated", reply.document
        context.entry = reply.entry.decode()
        return self._generate_step_result(Response())

    async def compensate(self, context: Import) -> None: ...


class Complete(SagaStepHandler[Import, Response]):
    async def act(self, context: Import) -> SagaStepResult[Import, Response]:
        context.state = "done"
        return self._generate_step_result(Response())

    async def compensate(self, context: Import) -> None: ...


class ImportUser(Saga[Import]):
    steps: ClassVar[list[type[SagaStepHandler[Import, Response]]]] = [
        Authenticate,
        Generate,
        Complete,
    ]


def map_sagas(mapper: SagaMap) -> None:
    mapper.bind(Import, ImportUser)


async def serve(given: Settings) -> None:
    engine = create_async_engine(
        given.with_drivers("asyncpg", "aiosqlite"),
        pool_size=20,
        max_overflow=0,
    )
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    bridge = await Bridge.open(given.redis)
    container = di.Container()
    container.bind(di.bind_by_type(di.dependent.Dependent(lambda: bridge, scope="request"), Bridge))
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    mediator = bootstrap(
        di_container=container,
        sagas_mapper=map_sagas,
        saga_storage=SqlAlchemySagaStorage(sessions),
    )
    limit = asyncio.Semaphore(given.concurrency)

    async def start(message: Message) -> None:
        saga_id = uuid.uuid5(uuid.NAMESPACE_URL, message.key)
        context = Import(message.key, message.document)
        entry = message.entry
        async with limit:
            async for _ in mediator.execute(context, saga_id):
                # The step is committed, and so is what it was told.
                bridge.acknowledge(entry)
                entry = context.entry.encode()
        bridge.finished(message.key)

    try:
        await bridge.consume(start)
    finally:
        await engine.dispose()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(until_terminated(serve(settings())))
