"""Dead letters of each kind that are replayed once what was wrong is right."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sagacity import Event, Saga, Service, State, on, subscribes
from sagacity.core.delivery import Delivery
from sagacity.core.routing import Retry
from sagacity.testing import Inline
from sagacity.worker.cycle import Cycle
from tests.worker.running import envelope

pytestmark = pytest.mark.asyncio


class Opened(Event, topic="accounts"):
    ref: str
    owner: str = ""


class Paid(Event, topic="accounts"):
    owner: str


class Closed(Event, topic="accounts"):
    ref: str


class Account(Saga, key="ref"):
    active = State()
    closed = State(final=True)

    ref: str
    paid: int = 0

    @on(Opened, starts=True, goto=active)
    def open(self, event: Opened) -> None:
        if event.owner:
            self.correlate("owner", event.owner)

    @on(Paid, key="owner", when=active, missing="wait")
    def pay(self, event: Paid) -> None:
        self.paid += 1

    @on(Closed, when=active, goto=closed, missing="wait")
    def close(self, event: Closed) -> None: ...


RETRY = Retry(missing_us=10_000_000)


async def test_a_message_that_was_given_up_finds_the_instance_that_came_later() -> None:
    """By a further key and by the instance's own; and it is a dead letter again where there is none."""
    async with Inline(Service("bank", sagas=[Account]), retry=RETRY) as app:
        await app.publish(Paid("ann"))
        await app.publish(Closed("a1"))
        await app.publish(Paid("nobody"))
        await app.publish(Closed("none"))
        await app.advance(timedelta(minutes=5))
        letters = {(one.row.lane, one.row.reason): one.id for one in await app.dead_letters()}
        assert set(letters) == {
            (lane, "missing") for lane in ("owner=ann", "owner=nobody", "ref=a1", "ref=none")
        }
        await app.publish(Opened("a1", "ann"))
        await app.run()
        assert await app.store.replay([letters["owner=ann", "missing"]]) == 1
        await app.run()
        assert (await app.saga(Account, "a1")).saga.paid == 1
        assert await app.store.replay(list(letters.values())) == 3
        await app.advance(timedelta(minutes=5))
        assert (await app.saga(Account, "a1")).state == "closed"
        left = [one.row.lane for one in await app.dead_letters()]
        assert sorted(left) == ["owner=nobody", "ref=none"]
        assert (await app.store.counts())["parked"] == 0


async def test_a_message_that_seemed_to_kill_is_handled_by_all_it_concerns() -> None:
    """It was not decoded, so nobody has seen it: a replay sends it to everybody, once."""
    noted: list[str] = []

    @subscribes(Opened)
    async def note(event: Opened) -> None:
        noted.append(event.ref)

    service = Service("bank", sagas=[Account], handlers=[note])
    async with Inline(service, retry=RETRY) as app:
        cycle = Cycle(service, service.catalog(), app.store, app.bus)
        suspect = Delivery(
            topic="accounts",
            entry_id="1-1",
            envelope=envelope(Opened("a1"), "m1"),
            attempt=5,
            fault="handed out 5 times",
        )
        await cycle.settle([suspect])
        for _ in range(2):
            [letter] = await app.dead_letters()
            assert (letter.row.reason, letter.row.consumer) == ("killer", "bank!")
            assert await app.store.replay([letter.id]) == 1
            await cycle.settle([suspect])  # and once more it seems to kill
        [letter] = await app.dead_letters()
        assert await app.store.replay([letter.id]) == 1
        await app.run()
        assert (await app.saga(Account, "a1")).state == "active"
        assert noted == ["a1"]
        assert await app.dead_letters() == []
