"""Tests that roll everything back, and still see what happens after a commit.

    async with Rehearsal(engine, service=service) as rehearsal:
        async with rehearsal.session() as session, session.begin():
            session.add(Order.place("o1"))
        assert rehearsal.events == [OrderPlaced("o1")]

All sessions share one connection with one outer transaction, which is rolled back at the end, so the
database stays as it was and no clean-up is needed. A session's commit only releases its SAVEPOINT,
but counts: subscribers after the commit are called, and so are the durable ones, each in a session of
its own, as if the event had come over the bus. What they record is delivered in turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, cast

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sagacity.backends.sql.database import configure
from sagacity.backends.sql.dispatch import Recording, SubscriberFailure, call, context_of, wanting
from sagacity.backends.sql.held import Written
from sagacity.backends.sql.session import SagaSession, recording_of
from sagacity.core.delivery import Envelope
from sagacity.core.errors import ConfigurationError
from sagacity.core.messages import Event
from sagacity.recording import Mode, Subscriber, originating
from sagacity.service import Context, Service, follow_ups

__all__ = ["Rehearsal"]


class Rehearsal:
    """Sessions inside one transaction that is always rolled back.

    `service` brings its subscribers, durable ones included, and `subscribers` are further ones. Its
    sagas and command handlers are not run: see `sagacity.testing.inline.Inline`. Leaving the block
    raises AssertionError if a subscriber failed, unless `failures_allowed`.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        service: Service | str = "",
        subscribers: Iterable[Subscriber] = (),
        failures_allowed: bool = False,
    ) -> None:
        given = tuple(subscribers)
        self._service = None if isinstance(service, str) else service
        self._durable = tuple(one for one in given if one.mode is Mode.DURABLE)
        settings = recording_of(service, given)
        deliver = Subscriber(
            event=Event, function=self._deliver, mode=Mode.AFTER_COMMIT, name="rehearsal"
        )
        self._recording = Recording(
            service=settings.service,
            subscribers=(*settings.subscribers, deliver),
            failed=self._note_failure,
            simulated=True,
        )
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._failures_allowed = failures_allowed
        self.events: list[Event] = []
        """Every event that was committed, in order."""
        self.envelopes: list[Envelope] = []
        """The same as messages, with their headers."""
        self.failures: list[SubscriberFailure] = []
        """What subscribers raised after a commit, durable ones included."""

    @property
    def connection(self) -> AsyncConnection:
        """The one connection: what it writes is rolled back as well."""
        if self._connection is None:
            raise ConfigurationError(
                "rehearsal: not begun; expected `async with Rehearsal(engine) as rehearsal`"
            )
        return self._connection

    def session(self, **options: Any) -> SagaSession:
        """A new session inside the outer transaction; `options` are those of `AsyncSession`."""
        options.setdefault("expire_on_commit", False)
        return SagaSession(
            self.connection,
            recording=self._recording,
            join_transaction_mode="create_savepoint",
            **options,
        )

    async def __aenter__(self) -> Self:
        if self._engine.dialect.name == "sqlite":
            configure(self._engine)
        connection = await self._engine.connect()
        try:
            await connection.begin()
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        connection, self._connection = self.connection, None
        try:
            await connection.rollback()
        finally:
            await connection.close()
        if error is None and self.failures and not self._failures_allowed:
            told = "\n".join(
                f"{one.subscriber} on {one.envelope.type}:\n{one.error}" for one in self.failures
            )
            raise AssertionError(f"{len(self.failures)} subscriber(s) failed:\n{told}")

    # ---------------------------------------------------------------------------------- delivery

    async def _deliver(self, event: Event, context: Context) -> None:
        self.events.append(event)
        self.envelopes.append(context.envelope)
        for subscriber in (*self._of_service(context.envelope), *wanting(self._durable, event)):
            try:
                await self._run(subscriber, event, context.envelope)
            except Exception as error:  # noqa: BLE001 - the others get it all the same
                self._note_failure(SubscriberFailure.of(subscriber, context.envelope, error))

    async def _run(self, subscriber: Subscriber, event: Event, envelope: Envelope) -> None:
        async with self.session() as session, session.begin():
            row = Written(event, envelope, 0, "")
            own = context_of(row, self._recording, lambda: session)
            with originating(own.origin):
                result = call(subscriber.function, event, own)
                if result is not None:
                    await result
            now = self._recording.now()
            rows = follow_ups(envelope, subscriber.name, own.outgoing, own.origin, now)
            await session.append_envelopes(rows)

    def _of_service(self, envelope: Envelope) -> list[Subscriber]:
        if self._service is None:
            return []
        return [
            Subscriber(
                event=cast("type[Event]", one.message),
                function=one.function,
                name=consumer,
                location=one.location,
            )
            for consumer, one in self._service.participants(envelope)
            if one.kind == "subscriber"
        ]

    def _note_failure(self, failure: SubscriberFailure) -> None:
        self.failures.append(failure)
