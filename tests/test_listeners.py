"""Publish and subscribe in one process: one execution, one block, the whole application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sagacity.core.errors import DefinitionError
from sagacity.core.messages import Command, Event
from sagacity.listeners import Announces, ListenerFailure, Listeners, listening

pytestmark = pytest.mark.asyncio


class RideEvent(Event, topic="rides", abstract=True):
    passenger: str


class RideHailed(RideEvent, topic="rides"):
    pass


class CouldNotHail(RideEvent, topic="rides"):
    reason: str = ""


class Paid(Event, topic="payments"):
    amount: int


class HailRide(Announces):
    def __init__(self, passenger: str) -> None:
        self.passenger = passenger

    async def run(self) -> None:
        if self.passenger == "banned":
            await self.announce(CouldNotHail(self.passenger, "banned"))
        else:
            await self.announce(RideHailed(self.passenger))


class OtherHailing(Announces):
    pass


# --- one execution -------------------------------------------------------------------------------


@pytest.mark.requirement("R3", "R5")
async def test_outcome_listeners_belong_to_one_execution() -> None:
    shown: list[str] = []

    async def sorry(event: CouldNotHail) -> None:
        shown.append(f"sorry: {event.reason}")

    def show(event: RideHailed) -> None:
        shown.append(f"ride for {event.passenger}")

    await HailRide("ann").on(RideHailed, show).on(CouldNotHail, sorry).run()
    await HailRide("banned").on(RideHailed, show).on(CouldNotHail, sorry).run()
    assert shown == ["ride for ann", "sorry: banned"]
    await HailRide("bob").run()
    assert len(shown) == 2, "a run without listeners tells nobody"


@pytest.mark.requirement("R3")
async def test_concurrent_executions_do_not_hear_each_other() -> None:
    heard: dict[str, list[str]] = {}

    def hearing(run: str) -> Any:
        return lambda event: heard.setdefault(run, []).append(event.passenger)

    await asyncio.gather(
        *(HailRide(name).on(RideHailed, hearing(name)).run() for name in ("ann", "bob", "cid"))
    )
    assert heard == {"ann": ["ann"], "bob": ["bob"], "cid": ["cid"]}


# --- the application -----------------------------------------------------------------------------


@pytest.mark.requirement("R4")
async def test_one_listener_hears_unrelated_announcers() -> None:
    application, heard = Listeners(), list[Event]()
    application.add(heard.append, RideHailed)
    await HailRide("ann").announcing_to(application).run()
    await OtherHailing().announcing_to(application).announce(RideHailed("bob"))
    await application.tell(RideHailed("cid"))
    await application.tell(Paid(3))
    assert heard == [RideHailed("ann"), RideHailed("bob"), RideHailed("cid")]


@pytest.mark.requirement("R4", "R20")
async def test_listeners_choose_by_class_by_name_by_announcer_or_everything() -> None:
    application = Listeners()
    heard: dict[str, list[str]] = {"class": [], "name": [], "by": [], "all": []}

    def hearing(key: str) -> Any:
        return lambda event: heard[key].append(type(event).__name__)

    application.add(hearing("class"), RideEvent)
    application.add(hearing("name"), "rides.Could*", "pay*")
    application.add(hearing("by"), RideHailed, by=OtherHailing)
    application.on()(hearing("all"))
    for announcer in (HailRide("ann"), OtherHailing()):
        announcer.announcing_to(application)
        await announcer.announce(RideHailed("ann"))
    await application.tell(CouldNotHail("ann"))
    await application.tell(Paid(3))
    assert heard == {
        "class": ["RideHailed", "RideHailed", "CouldNotHail"],
        "name": ["CouldNotHail", "Paid"],
        "by": ["RideHailed"],
        "all": ["RideHailed", "RideHailed", "CouldNotHail", "Paid"],
    }


async def test_a_listener_can_be_removed() -> None:
    application, heard = Listeners(), list[Event]()
    attachment = application.add(heard.append)
    application.add(heard.append, Paid)
    application.remove(attachment)
    application.remove(attachment)
    assert len(application) == 1
    await application.tell(RideHailed("ann"))
    assert heard == []


@pytest.mark.requirement("R20")
async def test_nobody_listening_is_no_error() -> None:
    assert await Listeners().tell(RideHailed("ann")) == ()
    assert await HailRide("ann").announce(RideHailed("ann")) == ()


async def test_two_applications_share_nothing() -> None:
    first, second, heard = Listeners(), Listeners(), list[Event]()
    first.add(heard.append)
    await second.tell(RideHailed("ann"))
    assert heard == []


# --- a block -------------------------------------------------------------------------------------


async def test_a_block_hears_everybody_until_it_ends() -> None:
    heard: list[Event] = []
    application = Listeners()
    with listening(heard.append, RideEvent), listening(heard.append, Paid):
        await HailRide("ann").run()
        await application.tell(RideHailed("bob"))
        application.tell_now(Paid(3))
        await HailRide("cid").announcing_to(application).run()
    await HailRide("dan").run()
    assert heard == [RideHailed("ann"), RideHailed("bob"), Paid(3), RideHailed("cid")]


async def test_a_block_ends_also_when_it_fails() -> None:
    heard: list[Event] = []
    with pytest.raises(RuntimeError), listening(heard.append):
        raise RuntimeError
    await Listeners().tell(Paid(3))
    assert heard == []


async def test_a_block_hears_its_own_tasks_and_no_others() -> None:
    heard: list[Event] = []
    other_may_speak = asyncio.Event()
    block_is_open = asyncio.Event()
    application = Listeners()

    async def other() -> None:
        await block_is_open.wait()
        await application.tell(RideHailed("other"))
        other_may_speak.set()

    task = asyncio.create_task(other())
    with listening(heard.append):
        block_is_open.set()
        await asyncio.create_task(HailRide("mine").run())
        await other_may_speak.wait()
    await task
    assert heard == [RideHailed("mine")]


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.requirement("R26")
async def test_failures_are_kept_and_stop_nobody(caplog: pytest.LogCaptureFixture) -> None:
    application, heard = Listeners(), list[str]()

    def first(event: Event) -> None:
        raise LookupError("no analytics")

    async def second(event: Event) -> None:
        await asyncio.sleep(0)
        raise OSError("no gateway")

    application.add(first, name="analytics")
    application.add(second)
    application.add(lambda event: heard.append("told"))
    failures = await application.tell(Paid(3))
    assert heard == ["told"]
    assert failures[0].listener == "analytics"
    assert [type(failure.error) for failure in failures] == [LookupError, OSError], (
        "every failure, not only the first"
    )
    assert "in second" in failures[1].traceback
    assert list(application.failures) == list(failures)
    assert "Listener failed" in caplog.text
    assert "LookupError: no analytics" in caplog.text
    assert await application.tell(Paid(4)) != ()
    assert heard == ["told", "told"], "a failure costs nobody the next event"


@pytest.mark.requirement("R26")
async def test_a_failing_outcome_listener_stops_neither_the_run_nor_the_others() -> None:
    heard: list[Event] = []
    application = Listeners()

    def fail(event: Event) -> None:
        raise ValueError

    application.add(heard.append)
    hail = HailRide("ann").on(RideHailed, fail).on(RideHailed, heard.append)
    failures = await hail.announcing_to(application).announce(RideHailed("ann"))
    assert len(heard) == 2
    assert len(failures) == 1
    assert list(application.failures) == [], "it was not the application's"


async def test_only_the_latest_failures_are_kept() -> None:
    application = Listeners(failures_kept=2)

    def fail(event: Event) -> None:
        raise ValueError

    application.add(fail)
    for amount in range(5):
        await application.tell(Paid(amount))
    assert [failure.event for failure in application.failures] == [Paid(3), Paid(4)]


async def test_cancelling_is_not_swallowed() -> None:
    application = Listeners()

    @asynccontextmanager
    async def waiting() -> AsyncIterator[asyncio.Task[Any]]:
        started = asyncio.Event()

        async def wait(event: Event) -> None:
            started.set()
            await asyncio.Event().wait()

        application.add(wait)
        task = asyncio.create_task(application.tell(Paid(1)))
        await started.wait()
        yield task

    async with waiting() as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(application.failures) == list[ListenerFailure]()


async def test_code_that_cannot_wait_tells_plain_listeners_only() -> None:
    application, heard = Listeners(), list[Event]()

    async def later(event: Event) -> None:
        heard.append(event)

    def fail(event: Event) -> None:
        raise ValueError("plain failure")

    application.add(later)
    application.add(fail)
    application.add(heard.append)
    failures = application.tell_now(Paid(3))
    assert heard == [Paid(3)]
    assert "is async" in str(failures[0].error)
    assert "plain failure" in failures[1].traceback
    assert len(application.failures) == 2


class Hail(Command, topic="rides"):
    passenger: str


@pytest.mark.parametrize("wrong", [Hail, int, RideHailed("ann")])
async def test_only_events_can_be_listened_to(wrong: Any) -> None:
    with pytest.raises(DefinitionError, match="expected a function, then classes of events"):
        Listeners().add(print, wrong)
    with pytest.raises(DefinitionError, match="expected an event"):
        await Listeners().tell(Hail("ann"))  # type: ignore[arg-type]
