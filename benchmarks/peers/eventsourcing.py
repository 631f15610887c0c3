"""eventsourcing 9.5.6: an event-sourced process, one aggregate for each saga.

Follows eventsourcing.readthedocs.io (application, persistence, system modules): the upstream is a
Redis stream instead of another application, so the process is an `EventSourcedProjection`, which
`ProcessApplication` extends by what reads the log of an upstream application and by a lock. Messages
are processed by threads, `--concurrency` of them; aggregates are cached, since this process is the
only one that writes them; positions are tracked one row each, since threads end in any order.

Committed in one transaction for each message: the aggregate's new event (state and history at
once) and the position in the stream. Commands are published after the commit and messages are
acknowledged after that: a crash between makes Redis deliver the message again, which is found to be
recorded and has its command published again, with the same id. No outbox; each insert locks the
table, as the library does, so commits are one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eventsourcing.application import ProcessingEvent
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import IntegrityError, Tracking
from eventsourcing.projection import EventSourcedProjection

from benchmarks.peers import PEERS
from benchmarks.peers.bridge import STREAM, Bridge, Message, Settings, settings, until_terminated

DURABLE = PEERS["eventsourcing"].durable
VERSION_OF = PEERS["eventsourcing"].distribution
STORES = PEERS["eventsourcing"].stores

COMMANDS = {"ImportRequested": "AuthenticateUser", "UserAuthenticated": "GenerateAccount"}


class ImportUser(Aggregate):
    """The saga's state is what its events say."""

    @event("ImportRequested")
    def __init__(self, key: str, document: str) -> None:
        self.key = key
        self.document = document
        self.state = "authenticating"

    @event("UserAuthenticated")
    def authenticated(self, document: str) -> None:
        self.document = document
        self.state = "generating"

    @event("AccountGenerated")
    def generated(self, document: str) -> None:
        self.document = document
        self.state = "done"

    @staticmethod
    def create_id(key: str) -> uuid.UUID:
        return uuid.uuid5(uuid.NAMESPACE_URL, key)


class Imports(EventSourcedProjection[uuid.UUID]):
    def policy(self, domain_event: Any, processing_event: ProcessingEvent[uuid.UUID]) -> None:
        message: Message = domain_event
        if message.name == "ImportRequested":
            saga = ImportUser(key=message.key, document=message.document)
        else:
            saga = self.repository.get(ImportUser.create_id(message.key))
            # The position tells deliveries apart; a message sent twice is told by the state.
            if (message.name, saga.state) == ("UserAuthenticated", "authenticating"):
                saga.authenticated(message.document)
            elif (message.name, saga.state) == ("AccountGenerated", "generating"):
                saga.generated(message.document)
        processing_event.collect_events(saga)

    def receive(self, message: Message) -> None:
        milliseconds, _, number = message.entry.partition(b"-")
        position = (int(milliseconds) << 20) + int(number)
        try:
            self.process_event(message, Tracking(STREAM, position))
        except IntegrityError:
            logging.getLogger(__name__).warning("Delivered again: %s", message.id)


def environment(given: Settings) -> dict[str, str]:
    common = {
        "SINGLE_ROW_TRACKING": "n",
        "AGGREGATE_CACHE_MAXSIZE": "10000",
        "AGGREGATE_CACHE_FASTFORWARD": "n",
    }
    if given.sqlite:
        path = given.store.removeprefix("sqlite:///")
        return {
            **common,
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": path,
            "SQLITE_LOCK_TIMEOUT": "30",
        }
    from psycopg.conninfo import conninfo_to_dict

    parts = conninfo_to_dict(given.store)
    return {
        **common,
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": str(parts["dbname"]),
        "POSTGRES_HOST": str(parts["host"]),
        "POSTGRES_PORT": str(parts.get("port", 5432)),
        "POSTGRES_USER": str(parts["user"]),
        "POSTGRES_PASSWORD": str(parts.get("password") or "none"),
        "POSTGRES_POOL_SIZE": str(given.concurrency + 1),
        "POSTGRES_MAX_OVERFLOW": "0",
    }


async def serve(given: Settings) -> None:
    bridge = await Bridge.open(given.redis)
    app = Imports(environment(given))
    threads = ThreadPoolExecutor(given.concurrency)
    loop = asyncio.get_running_loop()

    async def receive(message: Message) -> None:
        await loop.run_in_executor(threads, app.receive, message)
        if command := COMMANDS.get(message.name):
            await bridge.publish(command, message.key, message.document)
        else:
            bridge.finished(message.key)
        bridge.acknowledge(message.entry)

    try:
        await bridge.consume(receive, receive)
    finally:
        threads.shutdown(cancel_futures=True)
        app.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(until_terminated(serve(settings())))
