"""The campaign example: a linear saga is a mapping from events to commands."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from sqlalchemy import text

from examples.campaign.service import (
    Campaign,
    CampaignActivated,
    CampaignPublishing,
    PublishingConfirmed,
    PublishingRejected,
    SubmitAdvertisement,
    Tables,
    TrackPublishingConfirmation,
    TrackPublishingRejection,
    campaigns,
    publishing,
)
from sagacity.backends.sql.session import session_factory
from sagacity.core.messages import message_type
from tests.examples.two_ways import Running, Way, running

MAPPINGS = {
    (CampaignActivated, SubmitAdvertisement),
    (PublishingConfirmed, TrackPublishingConfirmation),
    (PublishingRejected, TrackPublishingRejection),
}
NAMES = {
    (message_type(event).name, message_type(command).name, message_type(command).topic)
    for event, command in MAPPINGS
}


class Ran(msgspec.Struct):
    """What came of two campaigns, one after the other."""

    rows: list[tuple[str, str, str]]
    messages: list[tuple[str, bytes, str]]
    stories: list[tuple[str, str, str, str, str]]


async def activate(at_work: Running, name: str, slogan: str) -> None:
    """One campaign, activated and followed to its end."""
    sessions = session_factory(at_work.store, service=campaigns)
    async with sessions() as session, session.begin():
        campaign = Campaign(id=name, slogan=slogan)
        session.add(campaign)
        campaign.activate()
    await at_work.finish(CampaignPublishing, name)


async def run(way: Way, store_url: str, bus_url: str) -> Ran:
    async with running(way, [campaigns, publishing], store_url, bus_url) as at_work:
        async with at_work.store.engine.begin() as connection:
            await connection.run_sync(Tables.metadata.create_all)
        await activate(at_work, "spring", "Boots for walking")
        await activate(at_work, "lottery", "Free money for everybody")
        async with at_work.store.engine.connect() as connection:
            found = await connection.execute(
                text("SELECT id, status, note FROM campaign ORDER BY id")
            )
            rows = [(row.id, row.status, row.note) for row in found]
        messages = await at_work.messages()
        stories = [
            *await at_work.story(CampaignPublishing, "spring"),
            *await at_work.story(CampaignPublishing, "lottery"),
        ]
    return Ran(rows, messages, stories)


@pytest.mark.requirement("R38")
def test_the_saga_declares_the_three_published_mappings() -> None:
    """Which event leads to which command can be read off the class, without running it."""
    definition = CampaignPublishing.__definition__
    commands = {sending.method: sending.message for sending in definition.sendings}
    declared = {
        (handler.trigger, commands[handler.name].name, commands[handler.name].topic)
        for handler in definition.handlers
        if handler.kind == "event"
    }
    assert declared == NAMES


@pytest.mark.requirement("R9", "R38")
@pytest.mark.asyncio
async def test_each_event_leads_to_its_command_inline_and_on_the_bus(
    store_url: str, sqlite_url: str, redis_url: str
) -> None:
    """The same rows, messages and transitions in both ways of running; the three mappings hold."""
    inline = await run("inline", sqlite_url + ".inline", redis_url)
    bus = await run("bus", store_url, redis_url)
    assert bus == inline
    assert inline.rows == [
        ("lottery", "rejected", "misleading slogan"),
        ("spring", "published", "ad-spring"),
    ]
    issued = {
        (cause, kind, kind.partition(".")[0])
        for kind, _, cause in inline.messages
        if kind in {command for _, command, _ in NAMES}
    }
    assert issued == NAMES


def test_the_example_runs() -> None:
    """`python -m examples.campaign` shows both campaigns to the end."""
    run = subprocess.run(
        [sys.executable, "-m", "examples.campaign"], check=True, capture_output=True, text=True
    )
    assert "spring: published (ad-spring)" in run.stdout
    assert "lottery: rejected (misleading slogan)" in run.stdout
    assert run.stderr == ""
