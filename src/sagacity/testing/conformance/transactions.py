"""The suite of `sagacity.ports.Store` and `Transaction`."""

# ruff: noqa: D102 - the name of a test is its claim

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from sagacity.core.errors import Conflict, KeyTaken
from sagacity.core.instance import (
    Armed,
    Compensation,
    Ledger,
    PendingCommand,
    Status,
    Undoable,
)
from sagacity.core.plan import Plan
from sagacity.ports import Lookup
from sagacity.testing.conformance.stores import (
    LARGEST,
    LOOKALIKES,
    SECOND,
    StoreDatabase,
    Workers,
    correlation,
    dead_letter,
    envelope,
    inbox,
    instance,
    message_ids,
    outbox,
    parked,
    timeout,
    transition,
    workers,
)

ODD_BYTES = b'\x00\xff\xfe{"nan": NaN, "lone": "\\ud800"}\x00'

__all__ = ["TransactionSuite"]


class Broken(Exception):
    """Raised by a test inside a transaction."""


def everything() -> dict[str, Any]:
    """A plan that writes to every table."""
    return {
        "saga_inserts": [instance()],
        "inbox": [inbox()],
        "correlations": [correlation("ann")],
        "outbox": [outbox("c1", "uid-of-o1")],
        "timeouts": [timeout()],
        "parked": [parked("m2")],
        "dead_letters": [dead_letter("m3")],
        "transitions": [transition()],
    }


class TransactionSuite:
    """One transaction: what it reads, what it locks, what it writes and what it refuses."""

    # --------------------------------------------------------------------------------- instances

    async def test_an_empty_database_knows_nothing(self, database: StoreDatabase) -> None:
        async with workers(database) as w, w.first.transaction() as transaction:
            loaded = await transaction.load({"Order": ["o1", "o2"], "Trip": ["o1"]})
            assert (loaded.instances, loaded.busy) == ({}, set())
            known = await transaction.known(
                [("Order", "m1")], [("uid", "late", 1)], [("Order", "m1")]
            )
            assert (known.seen, known.timeouts, known.parked) == (set(), set(), set())
            assert await transaction.correlated([Lookup("Order", "user", "ann")]) == {}

    async def test_nothing_asked_is_nothing_found(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(**everything())
            async with w.first.transaction() as transaction:
                assert (await transaction.load({})).instances == {}
                assert (await transaction.load({"Order": []})).instances == {}
                assert (await transaction.known([])).seen == set()
                assert await transaction.correlated([]) == {}

    async def test_now_is_the_time_of_the_store_at_the_begin(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            async with w.first.transaction() as transaction:
                begun = w.now
                w.clock.advance(60)
                assert transaction.now == begun
            assert w.first.clock.now() == w.now

    async def test_an_instance_comes_back_as_it_was(self, database: StoreDatabase) -> None:
        undoable = Undoable("c0", "Pay", "money", "Refund", 2, ODD_BYTES, confirmed=True)
        ledger = Ledger(
            pending={"c1": PendingCommand("c1", "Pay", "money", LARGEST)},
            undo=(undoable,),
            deferred=(envelope("m9", body=ODD_BYTES),),
            timeouts={"late": Armed(3, LARGEST)},
            generation=3,
            keys={"user": ("ann", "bob")},
            parked=(("Order", "m2"),),
            sequence={"money": 7},
            compensation=Compensation("why", (undoable,), {"c2": undoable}),
            correlation_id="c",
            actor="ann",
            steps=LARGEST,
        )
        odd = instance(
            "ключ \U0001f600",
            uid="u" * 191,
            version=LARGEST - 1,
            status=Status.STUCK,
            state="on hold",
            schema_version=2**31 - 1,
            data=ODD_BYTES,
            ledger=ledger,
            started_at=0,
            updated_at=LARGEST,
        )
        async with workers(database) as w:
            await w.write(saga_inserts=[odd])
            assert await w.load(odd.key) == {odd.key: odd}
            assert await w.second.saga("Order", odd.key) == odd

    async def test_an_update_replaces_all_of_it(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            after = instance(
                uid="another life",
                version=2,
                status=Status.COMPLETED,
                state="ready",
                schema_version=9,
                data=b'{"a":1}',
                ledger=Ledger(steps=5),
                started_at=7000,
                updated_at=8000,
            )
            await w.write(saga_updates=[(after, 1)])
            assert await w.load("o1", "o2") == {"o1": after, "o2": instance("o2")}

    async def test_a_stale_version_loses(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            await w.write(saga_updates=[(instance(version=2, data=b"first"), 1)])
            with pytest.raises(Conflict):
                await w.write(
                    saga_updates=[
                        (instance("o2", version=2, data=b"late"), 1),
                        (instance(version=2, data=b"late"), 1),
                    ],
                    inbox=[inbox()],
                    outbox=[outbox("c1")],
                )
            assert (await w.load("o1"))["o1"].data == b"first"
            assert (await w.load("o2"))["o2"].version == 1
            assert (await w.known(inbox=[("Order", "m1")])).seen == set()
            assert await w.pending() == []

    async def test_an_update_of_an_instance_that_is_gone_loses(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            with pytest.raises(Conflict):
                await w.write(saga_updates=[(instance(version=2), 1)])

    async def test_a_second_start_loses(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(data=b"first")])
            with pytest.raises(Conflict):
                await w.write(
                    saga_inserts=[instance("o2"), instance(data=b"late")], inbox=[inbox()]
                )
            assert (await w.load("o1", "o2")).keys() == {"o1"}
            assert (await w.load("o1"))["o1"].data == b"first"
            assert (await w.known(inbox=[("Order", "m1")])).seen == set()

    async def test_two_starts_at_the_same_time_have_one_winner(
        self, database: StoreDatabase
    ) -> None:
        outcomes: list[str] = []

        async def start(w: Workers, store_of: str) -> None:
            store = w.first if store_of == "first" else w.second
            try:
                async with store.transaction() as transaction:
                    await transaction.load({"Order": ["o1"]})
                    await anyio.lowlevel.checkpoint()
                    plan = Plan(now=w.now, saga_inserts=[instance(uid=store_of)])
                    await transaction.write(plan)
            except Conflict:
                outcomes.append("lost")
            else:
                outcomes.append("won")

        async with workers(database) as w:
            async with anyio.create_task_group() as group:
                group.start_soon(start, w, "first")
                group.start_soon(start, w, "second")
            assert sorted(outcomes) == ["lost", "won"]
            assert (await w.load("o1")).keys() == {"o1"}

    # ------------------------------------------------------------------------------------- locks

    async def test_held_is_busy_and_unknown_is_absent(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            if database.serial:
                await _second_waits_for_first(w)
                return
            async with w.first.transaction() as holder:
                await holder.load({"Order": ["o1"]})
                async with w.second.transaction() as other:
                    loaded = await other.load({"Order": ["o1", "o2", "o3"], "Trip": ["o1"]})
                    assert loaded.busy == {("Order", "o1")}
                    assert loaded.instances.keys() == {("Order", "o2")}
            async with w.second.transaction() as later:
                assert not (await later.load({"Order": ["o1"]})).busy

    async def test_waiting_gets_what_the_other_committed(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            holding, asked = anyio.Event(), anyio.Event()

            async def hold() -> None:
                async with w.first.transaction() as holder:
                    await holder.load({"Order": ["o1"]})
                    holding.set()
                    await asked.wait()
                    after = instance(version=2, data=b"new")
                    await holder.write(Plan(now=w.now, saga_updates=[(after, 1)], inbox=[inbox()]))

            async with anyio.create_task_group() as group:
                group.start_soon(hold)
                await holding.wait()
                asked.set()
                async with w.second.transaction() as other:
                    loaded = await other.load({"Order": ["o1", "o2"]}, wait=True)
                    assert loaded.busy == set()
                    assert loaded.instances["Order", "o1"].data == b"new"
                    # The guards are read under the lock: they show what the other did.
                    assert (await other.known([("Order", "m1")])).seen == {("Order", "m1")}

    async def test_waiting_ends_with_busy(self, database: StoreDatabase) -> None:
        if database.serial:
            return  # the second transaction would not even begin
        async with workers(database) as w:
            await w.write(saga_inserts=[instance(), instance("o2")])
            async with w.first.transaction() as holder:
                await holder.load({"Order": ["o1"]})
                with anyio.fail_after(15):
                    async with w.second.transaction() as other:
                        loaded = await other.load({"Order": ["o1", "o2", "o3"]}, wait=True)
                        assert loaded.busy == {("Order", "o1")}
                        assert loaded.instances.keys() == {("Order", "o2")}
                        # The transaction is still good.
                        await other.write(
                            Plan(now=w.now, saga_updates=[(instance("o2", version=2), 1)])
                        )
            assert (await w.load("o2"))["o2"].version == 2

    async def test_an_exception_rolls_everything_back(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            with pytest.raises(Broken):  # noqa: PT012 - it is raised inside the transaction
                async with w.first.transaction() as transaction:
                    await transaction.load({"Order": ["o1"]})
                    await transaction.write(Plan(now=w.now, **everything()))
                    raise Broken
            assert await w.is_untouched()
            assert await w.load("o1") == {}
            assert await w.correlated("ann") == ()
            assert await w.second.history("Order", "o1") == []
            await w.write(**everything())  # and nothing of it is in the way

    async def test_cancellation_rolls_everything_back(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            with anyio.CancelScope() as scope:
                async with w.first.transaction() as transaction:
                    await transaction.write(Plan(now=w.now, **everything()))
                    scope.cancel()
                    await anyio.sleep_forever()
            assert await w.is_untouched()
            await w.write(**everything())

    async def test_a_refused_plan_leaves_nothing_behind(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(inbox=[inbox("m0")])
            lists = everything()
            lists["inbox"] = [inbox("m1"), inbox("m0")]
            with pytest.raises(Conflict):
                await w.write(**lists)
            assert await w.is_untouched()
            assert await w.load("o1") == {}
            assert (await w.known(inbox=[("Order", "m1")])).seen == set()

    async def test_a_refused_plan_cannot_be_committed_by_catching_it(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(inbox=[inbox("m0")])
            with pytest.raises(Conflict):  # noqa: PT012 - it is raised by the exit
                async with w.first.transaction() as transaction:
                    refused = Plan(now=w.now, saga_inserts=[instance()], inbox=[inbox("m0")])
                    with pytest.raises(Conflict):
                        await transaction.write(refused)
            assert await w.is_untouched()

    async def test_an_empty_plan_is_no_error(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            assert await w.write() == []
            assert await w.is_untouched()

    # ------------------------------------------------------------------------------------- guards

    async def test_the_inbox_is_kept_for_each_consumer(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(inbox=[inbox("m1", "Order"), inbox("m2", "Trip")])
            asked = [("Order", "m1"), ("Trip", "m1"), ("Order", "m2"), ("Trip", "m2")]
            assert (await w.known(inbox=asked)).seen == {("Order", "m1"), ("Trip", "m2")}
            await w.write(inbox=[inbox("m1", "Trip")])
            with pytest.raises(Conflict):
                await w.write(inbox=[inbox("m1", "Order")])

    async def test_ids_that_look_alike_are_different(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            for id_ in LOOKALIKES:
                await w.write(
                    saga_inserts=[instance(id_, uid=id_, data=id_.encode())],
                    inbox=[inbox(id_, id_)],
                    correlations=[correlation(id_, id_, unique=True)],
                    outbox=[outbox(id_, id_)],
                    timeouts=[timeout(id_, uid=id_, key=id_)],
                    parked=[parked(id_, consumer=id_)],
                )
            loaded = await w.load(*LOOKALIKES)
            assert {key: found.data.decode() for key, found in loaded.items()} == {
                id_: id_ for id_ in LOOKALIKES
            }
            known = await w.known(
                inbox=[(id_, id_) for id_ in LOOKALIKES],
                timeouts=[(id_, id_, 1) for id_ in LOOKALIKES],
                parked=[(id_, id_) for id_ in LOOKALIKES],
            )
            assert known.seen == known.parked == {(id_, id_) for id_ in LOOKALIKES}
            assert known.timeouts == {(id_, id_, 1) for id_ in LOOKALIKES}
            assert await w.pending() == list(LOOKALIKES)
            for id_ in LOOKALIKES:
                assert await w.correlated(id_) == (id_,)

    async def test_a_large_batch(self, database: StoreDatabase) -> None:
        many = range(1500)
        async with workers(database) as w:
            rows = await w.write(
                saga_inserts=[instance(f"o{n}", data=b"x" * 300) for n in many],
                inbox=[inbox(f"m{n}") for n in many],
                correlations=[correlation("ann", f"o{n}") for n in many],
                outbox=[outbox(f"c{n}", f"uid-of-o{n}", body=b"y" * 300) for n in many],
                timeouts=[timeout(key=f"o{n}") for n in many],
                parked=[parked(f"p{n}") for n in many],
                transitions=[transition(key=f"o{n}") for n in many],
            )
            assert message_ids(rows) == [f"c{n}" for n in many]
            assert len(await w.load(*(f"o{n}" for n in many))) == len(many)
            assert len((await w.known(inbox=[("Order", f"m{n}") for n in many])).seen) == len(many)
            assert len(await w.correlated("ann")) == len(many)
            await w.write(
                saga_updates=[(instance(f"o{n}", version=2), 1) for n in many],
                unparked=[("Order", f"p{n}") for n in many],
                timeouts_cancelled=[(f"uid-of-o{n}", "late") for n in many],
                published=[row.seq for row in rows],
            )
            counts = await w.first.counts()
            assert (counts["parked"], counts["timeouts"], counts["outbox.pending"]) == (0, 0, 0)

    async def test_large_and_odd_bytes(self, database: StoreDatabase) -> None:
        large = ODD_BYTES * 40_000
        async with workers(database) as w:
            await w.write(
                saga_inserts=[instance(data=large)],
                outbox=[outbox("c1", body=large)],
                transitions=[transition(effects=large, entry=large)],
                dead_letters=[dead_letter(entry=large, error="\x00 \ud800 odd", decoded=False)],
            )
            assert (await w.load("o1"))["o1"].data == large
            [row] = await w.first.pending(LARGEST, 10)
            assert row.envelope == envelope("c1", body=large)
            [line] = await w.first.history("Order", "o1")
            assert (line.effects, line.entry) == (large, large)
            [letter] = await w.first.dead_letters()
            assert letter.row.entry == large

    # ------------------------------------------------------------------------------- correlations

    async def test_a_shared_key_finds_all_its_instances(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(
                correlations=[
                    correlation("ann", "o3"),
                    correlation("ann", "o1"),
                    correlation("ann", "o2"),
                    correlation("bob", "o1"),
                    correlation("ann", "o9", name="payer"),
                    correlation("ann", "o8", saga_type="Trip"),
                ]
            )
            asked = [
                Lookup("Order", "user", "ann"),
                Lookup("Order", "user", "bob"),
                Lookup("Trip", "user", "ann"),
                Lookup("Order", "user", "eve"),
            ]
            async with w.second.transaction() as transaction:
                assert await transaction.correlated(asked) == {
                    asked[0]: ("o1", "o2", "o3"),
                    asked[1]: ("o1",),
                    asked[2]: ("o8",),
                }

    async def test_a_known_key_is_no_error(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            twice = [correlation("ann"), correlation("zoe", unique=True)]
            await w.write(correlations=twice)
            await w.write(correlations=[*twice, correlation("ann", "o2")])
            assert await w.correlated("ann") == ("o1", "o2")
            assert await w.correlated("zoe") == ("o1",)

    async def test_a_unique_key_has_one_owner(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(correlations=[correlation("ann", "o1", unique=True)])
            with pytest.raises(KeyTaken) as caught:
                await w.write(
                    correlations=[
                        correlation("bob", "o2", unique=True),
                        correlation("ann", "o2", unique=True),
                    ],
                    inbox=[inbox()],
                )
            taken = caught.value
            assert (taken.saga_type, taken.name, taken.value) == ("Order", "user", "ann")
            assert taken.owner == "o1"
            assert await w.correlated("bob") == ()
            assert (await w.known(inbox=[("Order", "m1")])).seen == set()
            await w.write(  # the same value elsewhere is another key
                correlations=[
                    correlation("ann", "o2", unique=True, name="payer"),
                    correlation("ann", "o2", unique=True, saga_type="Trip"),
                ]
            )

    async def test_one_plan_cannot_give_a_unique_key_twice(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            with pytest.raises(KeyTaken):
                await w.write(
                    correlations=[correlation("ann", key, unique=True) for key in ("o1", "o2")]
                )
            assert await w.correlated("ann") == ()

    async def test_a_finished_instance_gives_its_keys_back(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(
                correlations=[
                    correlation("ann", "o1", unique=True),
                    correlation("bob", "o1"),
                    correlation("bob", "o2"),
                ]
            )
            await w.write(correlations_dropped=[("Order", "o1"), ("Order", "unheard of")])
            assert await w.correlated("ann") == ()
            assert await w.correlated("bob") == ("o2",)
            await w.write(correlations=[correlation("ann", "o2", unique=True)])
            assert await w.correlated("ann") == ("o2",)

    async def test_keys_are_given_back_before_the_next_instance_takes_its_own(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(correlations=[correlation("ann", "o1", unique=True)])
            await w.write(
                correlations=[correlation("bob", "o1", unique=True)],
                correlations_dropped=[("Order", "o1")],
            )
            assert await w.correlated("ann") == ()
            assert await w.correlated("bob") == ("o1",)

    async def test_a_key_that_only_finished_instances_had_is_told_from_an_unheard_one(
        self, database: StoreDatabase
    ) -> None:
        async with workers(database) as w:
            await w.write(correlations=[correlation("ann", "o1"), correlation("bob", "o1")])
            past = [("Order", "user", value) for value in ("ann", "bob")]
            await w.write(correlations_dropped=[("Order", "o1")], correlations_past=past)
            await w.write(
                correlations=[correlation("bob", "o2")],
                correlations_past=[("Order", "user", "bob")],
            )
            lookups = {value: Lookup("Order", "user", value) for value in ("ann", "bob", "eve")}
            async with w.first.transaction() as transaction:
                found = await transaction.correlated(lookups.values())
            assert found == {lookups["ann"]: (), lookups["bob"]: ("o2",)}

    # ----------------------------------------------------------------------------------- timeouts

    async def test_due_timeouts_come_oldest_first(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            now = w.now
            await w.write(
                timeouts=[
                    timeout("late", due_at=now, generation=4),
                    timeout("early", due_at=now - SECOND),
                    timeout("future", due_at=now + SECOND),
                    timeout("other", saga_type="Trip", due_at=now - SECOND),
                ]
            )
            due = await w.first.due(["Order"], 10)
            assert [(t.name, t.due_at) for t in due.timeouts] == [
                ("early", now - SECOND),
                ("late", now),
            ]
            last = due.timeouts[1]
            assert (last.uid, last.generation, last.saga_type, last.saga_key) == (
                "uid-of-o1",
                4,
                "Order",
                "o1",
            )
            assert due.next_at == now + SECOND
            assert [t.name for t in (await w.first.due(["Order"], 1)).timeouts] == ["early"]
            assert len((await w.first.due(["Order", "Trip"], 10)).timeouts) == 3
            assert (await w.first.due([], 10)).timeouts == []
            w.clock.advance(1)
            assert [t.name for t in (await w.first.due(["Order"], 10)).timeouts] == [
                "early",
                "late",
                "future",
            ]

    async def test_more_due_than_asked_for_is_due_at_once(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(timeouts=[timeout(f"t{n}", due_at=1) for n in range(3)])
            due = await w.first.due(["Order"], 2)
            assert due.next_at is not None
            assert due.next_at <= w.now
            assert (await w.first.due(["Trip"], 2)).next_at is None

    async def test_setting_a_timeout_again_replaces_it(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(timeouts=[timeout(generation=1, due_at=100)])
            await w.write(timeouts=[timeout(generation=2, due_at=200)])
            asked = [("uid-of-o1", "late", 1), ("uid-of-o1", "late", 2)]
            assert (await w.known(timeouts=asked)).timeouts == {asked[1]}
            assert [t.due_at for t in (await w.first.due(["Order"], 9)).timeouts] == [200]

    async def test_cancelling_comes_before_setting(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(timeouts=[timeout("late"), timeout("kept"), timeout("gone")])
            await w.write(
                timeouts_cancelled=[
                    ("uid-of-o1", "late"),
                    ("uid-of-o1", "gone"),
                    ("uid-of-o1", "never set"),
                ],
                timeouts=[timeout("late", generation=2)],
            )
            found = (await w.first.due(["Order"], 9)).timeouts
            assert {(t.name, t.generation) for t in found} == {("late", 2), ("kept", 1)}

    # ------------------------------------------------------------------------------------- parked

    async def test_a_parked_message_comes_back_as_it_was(self, database: StoreDatabase) -> None:
        odd = parked(
            "m1",
            saga_key="ключ",
            lane="user=ann",
            sequence=LARGEST,
            due_at=7,
            attempts=3,
            parked_at=LARGEST,
            reason="missing",
            error='Traceback\n  File "x\\y"\n\U0001f600',
            envelope=envelope("m1", body=ODD_BYTES, saga_uid="u", reply_topics=("a", "b")),
        )
        async with workers(database) as w:
            await w.write(parked=[odd])
            assert (await w.first.due(["Order"], 10)).parked == [odd]
            assert (await w.known(parked=[("Order", "m1"), ("Trip", "m1")])).parked == {
                ("Order", "m1")
            }

    async def test_due_parked_messages(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            now = w.now
            await w.write(
                parked=[
                    parked("second", due_at=now),
                    parked("first", due_at=now - 1),
                    parked("later", due_at=now + SECOND),
                    parked("held", due_at=None, reason="behind"),
                    parked("other", consumer="Trip", saga_type="Trip", due_at=0),
                    parked("work", saga_type="", saga_key="", reason="work", due_at=0),
                ]
            )
            due = await w.first.due(["Order"], 10)
            assert [row.message_id for row in due.parked] == ["first", "second"]
            assert due.next_at == now + SECOND
            assert [r.message_id for r in (await w.first.due(["Order"], 1)).parked] == ["first"]

    async def test_taking_over_needs_the_row(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(parked=[parked("m1"), parked("m2")])
            await w.write(unparked=[("Order", "m1")], inbox=[inbox("m1")])
            with pytest.raises(Conflict):
                await w.write(unparked=[("Order", "m2"), ("Order", "m1")], inbox=[inbox("m2")])
            assert (await w.known(parked=[("Order", "m1"), ("Order", "m2")])).parked == {
                ("Order", "m2")
            }
            assert (await w.known(inbox=[("Order", "m2")])).seen == set()

    async def test_a_row_taken_over_may_be_parked_again(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(parked=[parked("m1")])
            again = parked("m1", attempts=2, due_at=9)
            await w.write(unparked=[("Order", "m1")], parked=[again])
            assert (await w.first.due(["Order"], 10)).parked == [again]

    async def test_released_rows_are_due_at_once(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(
                parked=[
                    parked("m1", due_at=None),
                    parked("m2", due_at=None),
                    parked("m3", due_at=w.now + SECOND),
                    parked("m4", due_at=5),
                ]
            )
            await w.write(
                released=[("Order", "m1"), ("Order", "m3"), ("Order", "m4"), ("Order", "gone")]
            )
            due = {row.message_id: row.due_at for row in (await w.first.due(["Order"], 10)).parked}
            assert due.keys() == {"m1", "m3", "m4"}
            assert due["m1"] == due["m3"] == w.now

    async def test_woken_rows_waited_for_an_instance(self, database: StoreDatabase) -> None:
        later = 10**17
        async with workers(database) as w:
            await w.write(
                parked=[
                    parked("m1", lane="user=ann", reason="missing", due_at=later),
                    parked("m2", lane="user=bob", reason="missing", due_at=later),
                    parked("m3", lane="user=ann", saga_type="Trip", due_at=later),
                ]
            )
            await w.write(woken=[("Order", "user=ann"), ("Order", "user=nobody")])
            due = await w.first.due(["Order", "Trip"], 10)
            assert [row.message_id for row in due.parked] == ["m1"]

    async def test_rows_parked_in_a_plan_can_be_woken_by_it(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.write(
                parked=[parked("m1", lane="user=ann", reason="missing", due_at=10**17)],
                woken=[("Order", "user=ann")],
            )
            assert len((await w.first.due(["Order"], 10)).parked) == 1

    async def test_closing_twice_is_safe(self, database: StoreDatabase) -> None:
        async with workers(database) as w:
            await w.second.close()
            await w.second.close()


async def _second_waits_for_first(w: Workers) -> None:
    order: list[str] = []
    holding = anyio.Event()

    async def second() -> None:
        await holding.wait()
        async with w.second.transaction() as other:
            order.append("second began")
            loaded = await other.load({"Order": ["o1", "o3"]})
            assert loaded.instances.keys() == {("Order", "o1")}
            assert not loaded.busy

    async with anyio.create_task_group() as group:
        group.start_soon(second)
        async with w.first.transaction() as holder:
            await holder.load({"Order": ["o1"]})
            holding.set()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            order.append("first ends")
    assert order == ["first ends", "second began"]
