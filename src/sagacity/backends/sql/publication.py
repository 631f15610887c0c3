"""From recorded events to outbox rows and subscribers, along one session's transactions."""

from __future__ import annotations

import inspect as python_inspect
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import async_session
from sqlalchemy.orm import InstanceState, Session, SessionTransaction
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from sagacity.backends.sql.append import envelopes, insert_rows, origin_at, subject_of
from sagacity.backends.sql.dispatch import (
    Recording,
    call,
    call_after_commit,
    context_of,
    wanting,
)
from sagacity.backends.sql.held import Held, Standing, Written
from sagacity.backends.sql.tables import outbox
from sagacity.core.errors import ConfigurationError, StoreError
from sagacity.core.messages import Event
from sagacity.core.plan import OutboxRow
from sagacity.ports import PendingRow
from sagacity.recording import Origin, RecordedEvent, RecordsEvents
from sagacity.service import follow_ups

logger = logging.getLogger("sagacity.session")


class Publication:
    """What one session publishes; the session tells it of begins, commits and ends."""

    def __init__(self, session: Session, recording: Recording) -> None:
        self.session = session
        self.recording = recording
        self.origin: Origin | None = None
        self.held = Held()
        self.merged: dict[int, RecordsEvents] = {}
        """Objects given to `merge` -> what stands for them in the session."""
        self.failed: BaseException | None = None
        """Why the open transaction may not be committed any more."""
        self._committed = False
        self._released: SessionTransaction | None = None
        self._wrote_on: Connection | None = None

    def before_change(self, recorder: RecordsEvents) -> None:
        """An entity of the session records: see `sagacity.recording.Holder`."""
        if not self.session.in_transaction() and self.session.autobegin:
            self.session.begin()  # as a changed attribute does, so that a rollback is one
        self.held.hold(recorder)

    # -------------------------------------------------------------------------------- writing

    def write_recorded(self, origin: Origin | None = None) -> list[PendingRow]:
        """Flushes, and writes what is recorded so far as outbox rows."""
        self.session.flush()  # fills in generated keys, and locks the entities' rows before ours
        for recorder in self.held.recorders:
            if self._belongs_elsewhere(recorder):
                self.held.release(recorder)
        items: list[tuple[str, RecordedEvent]] = []
        for recorder, item in self.held.drain():
            self._check_database(recorder)
            items.append((subject_of(self.merged.get(id(recorder), recorder)), item))
        return self.write(items, origin)

    def write(
        self, items: Sequence[tuple[str, RecordedEvent]], origin: Origin | None
    ) -> list[PendingRow]:
        """Writes (subject, event) pairs as outbox rows of the open transaction."""
        rows = envelopes(items, lambda item: self._origin_of(item, origin), self.recording.new_id)
        return self.write_rows(rows, [item.event for _, item in items])

    def write_rows(
        self, rows: Sequence[OutboxRow], events: Sequence[Event] | None = None
    ) -> list[PendingRow]:
        """Writes outbox rows; the subscribers of this process see those whose `events` are given."""
        if not rows:
            return []
        connection = self._outbox_connection()
        written = insert_rows(connection, rows, self.recording.now())
        self._wrote_on = connection
        told = iter(events or ())
        self.held.note(
            Written(next(told, None), row.envelope, row.seq, row.lane) for row in written
        )
        return written

    def _origin_of(self, item: RecordedEvent, explicit: Origin | None) -> Origin:
        origin = explicit or self.origin or origin_at(item)
        earlier = self.held.written
        traced = self.recording.trace_context() if self.recording.trace_context else None
        traceparent, tracestate = traced or (origin.traceparent, origin.tracestate)
        # What one unit of work tells without a cause is one story, also when written in parts.
        shared = earlier[0].envelope.correlation_id if earlier else ""
        return msgspec.structs.replace(
            origin,
            source=origin.source or self.recording.service,
            correlation_id=origin.correlation_id or shared,
            traceparent=traceparent,
            tracestate=tracestate,
        )

    def _outbox_connection(self) -> Connection:
        try:
            return self.session.connection(bind_arguments={"clause": outbox})
        except UnboundExecutionError as error:
            raise ConfigurationError(
                "session: no engine for the outbox; expected the outbox in the database of the "
                "entities that record; add its tables to `binds`, or bind the session to one engine"
            ) from error

    def _check_database(self, recorder: RecordsEvents) -> None:
        state = inspect(recorder, raiseerr=False)
        if not isinstance(state, InstanceState):
            return
        ours = self._outbox_connection().engine.url
        theirs = self.session.get_bind(type(recorder)).engine.url
        if ours != theirs:
            raise ConfigurationError(
                f"session: {type(recorder).__name__} lives in another database than the outbox "
                f"({theirs.render_as_string()}, {ours.render_as_string()}); expected one database, for "
                "state and events are one write; give each database a session and an outbox of its own"
            )

    # ------------------------------------------------------------------------------- committing

    def before_commit(self) -> None:
        """Writes the rest and shows all of it to the subscribers inside the transaction."""
        if self.session.in_nested_transaction():
            return  # releasing a SAVEPOINT is no commit
        if self.failed is not None:
            raise StoreError(
                "session: this transaction failed while it was committed; expected a rollback, got "
                "another commit; roll it back and do the work again"
            ) from self.failed
        try:
            self.write_recorded()
            while fresh := [row for row in self.held.written if not row.shown]:
                for row in fresh:
                    row.shown = True
                    self._show(row)
        except BaseException as error:
            self.failed = error
            raise

    def _show(self, row: Written) -> None:
        event = row.event
        if event is None:
            return
        facade: Any = async_session(self.session) or self.session
        followed = False
        for subscriber in wanting(self.recording.inside, event):
            context = context_of(row, self.recording, lambda: facade)
            self._settle(call(subscriber.function, event, context))
            now = self.recording.now()
            self.write_rows(
                follow_ups(row.envelope, subscriber.name, context.outgoing, context.origin, now)
            )
            followed = True
        if followed:
            # What they recorded follows from this event. A loop of them ends at HOPS_MAX.
            self.write_recorded(Origin.following(row.envelope, source=self.recording.service))

    def _settle(self, result: Awaitable[Any] | None) -> None:
        if result is None:
            return
        if in_greenlet():
            await_only(result)
            return
        if python_inspect.iscoroutine(result):
            result.close()
        raise ConfigurationError(
            "session: an async subscriber needs an async session; expected SagaSession, got a plain "
            f"{type(self.session).__name__}; make sessions with session_factory"
        )

    def committed(self) -> None:
        """The database said yes, to the transaction or to the release of a SAVEPOINT."""
        if self.session.in_nested_transaction():
            self._released = self.session.get_nested_transaction()
        else:
            self._committed = True

    # ----------------------------------------------------------------------------------- ending

    def ended(self) -> None:
        """The transaction is over, with or without commit."""
        committed, connection = self._committed, self._wrote_on
        self._committed, self._wrote_on, self.failed = False, None, None
        if not committed:
            self.held.undo(self._standing)
            self.merged = {}
            return
        rows = self.held.commit()
        self.merged = {}
        for recorder in self.held.recorders:
            logger.warning(
                "Event recorded too late for its commit, it leaves with the next one (entity=%s)",
                type(recorder).__qualname__,
            )
        if rows:
            self._after_commit(rows, connection)

    def _after_commit(self, rows: Sequence[Written], connection: Connection | None) -> None:
        settings = self.recording
        inner = connection is not None and not connection.closed and connection.in_transaction()
        if inner and not settings.simulated:
            # Only our part of somebody else's transaction is over; it may still be rolled back.
            if settings.after:
                logger.warning(
                    "After-commit subscribers are not called, for the session works inside an outer "
                    "transaction (events=%d)",
                    len(rows),
                )
            return
        if settings.nudge is not None:
            try:
                settings.nudge()
            except Exception:
                logger.exception("Relay could not be nudged, its next sweep finds the events")
        if settings.after:
            bind = self.session.get_bind(clause=outbox)
            call_after_commit(settings, rows, bind, self._settle)

    def savepoint_ended(self, savepoint: SessionTransaction) -> None:
        """A SAVEPOINT was released or rolled back."""
        if savepoint is self._released:
            self.held.release_savepoint()
        else:
            self.held.undo_savepoint(self._standing)
        self._released = None

    def _standing(self, recorder: RecordsEvents) -> Standing:
        state = inspect(recorder, raiseerr=False)
        known = isinstance(state, InstanceState) and state.key is not None
        return Standing.OWN if known and id(recorder) not in self.merged else Standing.LOOSE

    def _belongs_elsewhere(self, recorder: RecordsEvents) -> bool:
        # A new object that was expunged will never be stored; one that another session has is its.
        state = inspect(recorder, raiseerr=False)
        if not isinstance(state, InstanceState) or id(recorder) in self.merged:
            return False
        return state.transient or (state.session is not None and state.session is not self.session)
