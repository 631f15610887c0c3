"""Whatever is recorded, written, rolled back and released in whatever order: only the truth leaves."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import StaticPool, create_engine, event, select
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.orm.attributes import flag_modified

from sagacity.backends.sql.session import RecordingSession
from sagacity.backends.sql.tables import metadata, outbox
from tests.backends.sql.orders import Model, Noted, Order

KNOWN = ("k0", "k1")
"""References of orders that the database knows from the start."""


BODIES = select(outbox.c.body)


class Entity:
    """What the model believes of one order."""

    def __init__(self, *, known: bool) -> None:
        self.known = known
        """The database has it, also after the open transaction is rolled back."""
        self.attached = known
        self.pending: list[int] = []
        self.written: list[int] = []


class SavepointMachine(RuleBasedStateMachine):
    """Plays with one session; the model is a stack of copies."""

    @initialize()
    def open(self) -> None:
        self.engine = create_engine("sqlite://", poolclass=StaticPool)

        @event.listens_for(self.engine, "connect")
        def no_driver_transactions(connection: Any, _record: object) -> None:
            connection.isolation_level = None

        @event.listens_for(self.engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN")

        metadata.create_all(self.engine)
        Model.metadata.create_all(self.engine)
        self.session = RecordingSession(self.engine, expire_on_commit=False)
        with self.session.begin():
            self.session.add_all([Order(ref=ref) for ref in KNOWN])
        self.session.expunge_all()
        self.model = {ref: Entity(known=True) for ref in KNOWN}
        self.stack: list[tuple[SessionTransaction, dict[str, Entity]]] = []
        self.new: dict[str, Order] = {}
        """Orders made here; the test holds them, as their maker would."""
        self.public: list[int] = []
        self.counter = 0

    def order(self, ref: str) -> Order:
        return self.new.get(ref) or self.session.get_one(Order, KNOWN.index(ref) + 1)

    def refs(self) -> list[str]:
        return sorted(self.model)

    # --- what a program does ---------------------------------------------------------------------

    @rule(data=st.data(), change=st.booleans())
    def record(self, data: st.DataObject, *, change: bool) -> None:
        ref = data.draw(st.sampled_from(self.refs()))
        self.counter += 1
        order = self.order(ref)
        order.record(Noted(str(self.counter)))
        if change and self.model[ref].attached:
            flag_modified(order, "ref")
        self.model[ref].pending.append(self.counter)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.refs()))
        self.order(ref).cancel_events(Noted)
        self.model[ref].pending = []

    @precondition(lambda self: len(self.model) < 4)
    @rule()
    def make(self) -> None:
        ref = f"n{len(self.model)}"
        self.new[ref] = Order(ref=ref)
        self.model[ref] = Entity(known=False)
        for _, saved in self.stack:
            saved[ref] = Entity(known=False)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        loose = [ref for ref, entity in self.model.items() if not entity.attached]
        if loose:
            ref = data.draw(st.sampled_from(sorted(loose)))
            self.session.add(self.new[ref])
            self.model[ref].attached = True

    @rule()
    def write(self) -> None:
        self.session.write_events()
        for entity in self.model.values():
            if entity.attached:
                entity.written += entity.pending
                entity.pending = []

    # --- transactions ----------------------------------------------------------------------------

    @precondition(lambda self: len(self.stack) < 4)
    @rule()
    def begin_nested(self) -> None:
        gc.collect()  # nothing but the session keeps an entity that has recorded
        savepoint = self.session.begin_nested()
        self.stack.append((savepoint, copy.deepcopy(self.model)))

    @precondition(lambda self: self.stack)
    @rule()
    def release(self) -> None:
        savepoint, _ = self.stack.pop()
        savepoint.commit()

    @precondition(lambda self: self.stack)
    @rule()
    def roll_back_to_savepoint(self) -> None:
        savepoint, saved = self.stack.pop()
        savepoint.rollback()
        for ref, entity in self.model.items():
            before = saved[ref]
            if before.attached:
                self.model[ref] = before
            elif entity.attached:
                self.loosen(ref, entity, before.written)

    @rule()
    def commit(self) -> None:
        self.session.commit()
        self.stack = []
        for entity in self.model.values():
            if entity.attached:
                self.public += entity.written + entity.pending
                entity.written, entity.pending, entity.known = [], [], True

    @rule()
    def roll_back(self) -> None:
        self.session.rollback()
        self.stack = []
        for ref, entity in self.model.items():
            if entity.known:
                entity.written, entity.pending = [], []
            elif entity.attached:
                self.loosen(ref, entity, [])

    def loosen(self, ref: str, entity: Entity, kept: list[int]) -> None:
        # The database has forgotten its id, and may give it to another one: so must its maker.
        self.new[ref].id = None  # type: ignore[assignment]
        entity.pending = sorted({*entity.written, *entity.pending} - {*kept})
        entity.written = kept
        entity.attached = False

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def every_entity_has_what_the_model_says(self) -> None:
        if not hasattr(self, "session"):
            return
        found = [one for one in self.session.identity_map.values() if isinstance(one, Order)]
        present = {KNOWN[one.id - 1]: one for one in found if one.id <= len(KNOWN)}
        for ref, entity in self.model.items():
            order = self.new.get(ref) or present.get(ref)
            events = order.pending_events if order is not None else ()
            assert [one.text for one in events if isinstance(one, Noted)] == [
                str(number) for number in entity.pending
            ], ref

    @invariant()
    def the_outbox_has_what_was_committed_and_what_is_written(self) -> None:
        if not hasattr(self, "session"):
            return
        rows = self.session.connection().execute(BODIES).scalars()
        found = [int(body.decode().partition(":")[2].strip('"}')) for body in rows]
        open_ = [number for entity in self.model.values() for number in entity.written]
        assert sorted(found) == sorted([*self.public, *open_])

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.rollback()
            rows = self.session.connection().execute(BODIES).scalars().all()
            assert len(rows) == len(self.public)
            self.session.close()
            self.engine.dispose()


TestSavepoints = SavepointMachine.TestCase
TestSavepoints.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSavepoints = pytest.mark.requirement("R17", "R19", "R54")(TestSavepoints)
