"""A SQLAlchemy session that turns recorded events into outbox rows when it commits.

    sessions = session_factory(engine, service="shop")
    async with sessions() as session, session.begin():
        order = await session.get_one(Order, 42)
        order.ship()                                    # records OrderShipped

State and events are one write: the rows are inserted by the transaction that changes the entities,
just before it commits, and a rollback of any kind takes them along. Subscribers of this process are
called inside the transaction (`Mode.IN_TRANSACTION`) or after it (`Mode.AFTER_COMMIT`); durable ones
get the events over the bus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

from sqlalchemy import event, inspect
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, object_session

from sagacity.backends.sql.database import configure
from sagacity.backends.sql.dispatch import Recording, SubscriberFailure
from sagacity.backends.sql.publication import Publication
from sagacity.core.delivery import Envelope
from sagacity.core.errors import ConfigurationError
from sagacity.core.plan import OutboxRow
from sagacity.ports import Clock, PendingRow
from sagacity.recording import (
    Holder,
    Origin,
    RecordedEvent,
    RecordsEvents,
    Subscriber,
    find_holders_with,
    pending,
)
from sagacity.service import Service

__all__ = [
    "Recording",
    "RecordingSession",
    "SagaSession",
    "SubscriberFailure",
    "recording_of",
    "session_factory",
]

logger = logging.getLogger("sagacity.session")

T = TypeVar("T")


class RecordingSession(Session):
    """The synchronous session inside a `SagaSession`.

    Alone it publishes too, but can call no async subscribers. It may be subclassed and handed to a
    SagaSession as ``sync_session_class``.
    """

    def __init__(self, *args: Any, recording: Recording | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.publication = Publication(self, recording or Recording())

    def collect(self, *recorders: RecordsEvents) -> None:
        """Takes objects that are not mapped: their pending events belong to this transaction."""
        for recorder in recorders:
            self.publication.before_change(recorder)

    def merge(self, instance: T, **options: Any) -> T:
        """As SQLAlchemy's; what the given objects have pending goes along."""
        merged = super().merge(instance, **options)
        self._take_over(instance, merged)
        return merged

    def merge_all(self, instances: Iterable[T], **options: Any) -> Sequence[T]:
        """As SQLAlchemy's (2.1); what the given objects have pending goes along."""
        given = list(instances)
        together = cast("Callable[..., Sequence[T]]", super().merge_all)
        merged = together(given, **options)
        for one, known in zip(given, merged, strict=True):
            self._take_over(one, known)
        return merged

    def _take_over(self, instance: object, merged: object) -> None:
        for one in (instance, *_cascaded(instance)):
            if isinstance(one, RecordsEvents) and pending(one) and object_session(one) is not self:
                known = merged if one is instance else one
                self.publication.merged[id(one)] = (
                    known if isinstance(known, RecordsEvents) else one
                )
                self.collect(one)

    def write_events(self) -> list[PendingRow]:
        """Flushes, and writes what is recorded so far as outbox rows of this transaction."""
        return self.publication.write_recorded()

    def append_events(
        self, items: Sequence[tuple[str, RecordedEvent]], origin: Origin | None
    ) -> list[Envelope]:
        """Writes (subject, event) pairs at once; see `sagacity.backends.sql.append.append`."""
        return [row.envelope for row in self.publication.write(items, origin)]

    def append_envelopes(self, rows: Sequence[OutboxRow]) -> list[PendingRow]:
        """Writes outbox rows as they are, in this transaction."""
        return self.publication.write_rows(rows)

    def commit(self) -> None:
        """As SQLAlchemy's; a subscriber's veto rolls everything back before it is raised."""
        try:
            super().commit()
        except BaseException:
            if self.publication.failed is not None and self.in_transaction():
                self.rollback()
            raise


class SagaSession(AsyncSession):
    """An `AsyncSession` that publishes what its entities record.

    Takes the arguments of `AsyncSession`, and `recording` for the service's settings. Entities are
    found however they were touched: new, dirty, clean, through a collection only, deleted, or dropped
    by the program after they recorded. A rollback, also of a SAVEPOINT, takes its events back.
    """

    sync_session_class = RecordingSession

    @property
    def _recorder(self) -> RecordingSession:
        session = self.sync_session
        if not isinstance(session, RecordingSession):
            raise ConfigurationError(
                f"SagaSession: expected a sync_session_class derived from RecordingSession, got "
                f"{type(session).__qualname__}; events of its entities would be lost"
            )
        return session

    @property
    def origin(self) -> Origin | None:
        """Cause, correlation and actor of everything this session publishes.

        None means the one of the enclosing `originating` block.
        """
        return self._recorder.publication.origin

    @origin.setter
    def origin(self, origin: Origin | None) -> None:
        self._recorder.publication.origin = origin

    @property
    def recording(self) -> Recording:
        """Settings of the service this session works for."""
        return self._recorder.publication.recording

    def collect(self, *recorders: RecordsEvents) -> None:
        """Takes objects that are not mapped: their pending events leave with this transaction."""
        self._recorder.collect(*recorders)

    async def write_events(self) -> list[PendingRow]:
        """Flushes, and writes what is recorded so far as outbox rows of this transaction.

        Commit does it by itself. Events written here can be read by SQL in this transaction, and
        cannot be merged or cancelled any more. Returns the rows.
        """
        return await self.run_sync(lambda _: self._recorder.write_events())

    async def append_envelopes(self, rows: Sequence[OutboxRow]) -> None:
        """Writes outbox rows as they are, in this transaction (see `Service.start`)."""
        await self.run_sync(lambda _: self._recorder.append_envelopes(rows))


class _HasEngine(Protocol):
    @property
    def engine(self) -> AsyncEngine: ...


def session_factory(
    store_or_engine: AsyncEngine | _HasEngine,
    *,
    service: Service | str = "",
    subscribers: Iterable[Subscriber] = (),
    nudge: Callable[[], None] | None = None,
    recording: Recording | None = None,
    **options: Any,
) -> async_sessionmaker[SagaSession]:
    """Makes sessions on the engine of a store (or any engine) whose events become outbox rows.

    `service` is the source of the events; a `Service` brings its subscribers along. `subscribers` are
    further ones, called inside the transaction or after it, as their mode says; durable ones are left
    to the bus. `nudge` is called after each commit that wrote events, to wake a relay. `recording` gives
    all settings at once instead. Outbox rows bear the store's time, or the machine's where an engine is
    given. Further options go to SQLAlchemy; objects stay readable after commit
    (``expire_on_commit=False``) unless they say otherwise.

    An SQLite engine gets the store's settings (``BEGIN IMMEDIATE``, WAL), without which the driver
    begins transactions too late and breaks SAVEPOINTs.
    """
    engine = store_or_engine if isinstance(store_or_engine, AsyncEngine) else store_or_engine.engine
    if engine.dialect.name == "sqlite":
        configure(engine)
    settings = recording or recording_of(service, subscribers, nudge)
    clock: Clock | None = getattr(store_or_engine, "clock", None)
    if recording is None and clock is not None:
        settings = replace(settings, now=clock.now)
    options.setdefault("expire_on_commit", False)
    return async_sessionmaker(engine, class_=SagaSession, recording=settings, **options)


def recording_of(
    service: Service | str,
    subscribers: Iterable[Subscriber] = (),
    nudge: Callable[[], None] | None = None,
) -> Recording:
    """The settings of a service's sessions: its name as source, and its subscribers of this process."""
    own = [] if isinstance(service, str) else service.local_subscribers
    name = service if isinstance(service, str) else service.name
    return Recording(service=name, subscribers=(*own, *subscribers), nudge=nudge)


# ------------------------------------------------------------------------- what SQLAlchemy tells us


def _holder_of(recorder: RecordsEvents) -> Holder | None:
    state = inspect(recorder, raiseerr=False)
    session = state.session if isinstance(state, InstanceState) else None
    if isinstance(session, RecordingSession):
        return session.publication
    if session is not None:
        _watch(session, recorder)
    return None


_WATCHED = "sagacity.recording"


def _watch(session: Session, recorder: RecordsEvents) -> None:
    # A plain session knows nothing of events: it would lose them without a word.
    if _WATCHED not in session.info:
        session.info[_WATCHED] = {}
        event.listen(session, "after_commit", _warn_of_lost_events)
    session.info[_WATCHED][id(recorder)] = recorder


def _warn_of_lost_events(session: Session) -> None:
    if session.in_nested_transaction():
        return
    watched: dict[int, RecordsEvents] = session.info[_WATCHED]
    for recorder in watched.values():
        if pending(recorder):
            logger.warning(
                "Events are recorded but a plain session does not publish them: use SagaSession, or append "
                "them before the commit (entity=%s, events=%d)",
                type(recorder).__qualname__,
                len(pending(recorder)),
            )
    watched.clear()


find_holders_with(_holder_of)


def _cascaded(instance: object) -> list[object]:
    state = inspect(instance, raiseerr=False)
    if not isinstance(state, InstanceState):
        return []
    return [found[0] for found in state.mapper.cascade_iterator("merge", state)]


@event.listens_for(RecordingSession, "after_attach", propagate=True)
def _attached(session: RecordingSession, instance: object) -> None:
    if isinstance(instance, RecordsEvents) and pending(instance):
        session.publication.before_change(instance)


@event.listens_for(RecordingSession, "before_commit", propagate=True)
def _committing(session: RecordingSession) -> None:
    session.publication.before_commit()


@event.listens_for(RecordingSession, "after_commit", propagate=True)
def _committed(session: RecordingSession) -> None:
    session.publication.committed()


@event.listens_for(RecordingSession, "after_transaction_create", propagate=True)
def _begun(session: RecordingSession, transaction: SessionTransaction) -> None:
    if transaction.nested:
        session.publication.held.begin_savepoint()


@event.listens_for(RecordingSession, "after_transaction_end", propagate=True)
def _ended(session: RecordingSession, transaction: SessionTransaction) -> None:
    if transaction.nested:
        session.publication.savepoint_ended(transaction)
    elif transaction.parent is None:
        session.publication.ended()
