"""Campaign publishing, the saga of *Learning Domain-Driven Design*, chapter 9.

A linear saga maps events to commands and decides nothing:

    CampaignActivated    ->  SubmitAdvertisement          to publishing
    PublishingConfirmed  ->  TrackPublishingConfirmation  to campaigns
    PublishingRejected   ->  TrackPublishingRejection     to campaigns

The campaign is an entity. It records that it was activated and knows nothing of publishing; publishing
places advertisements and knows nothing of campaigns. Only the saga knows both.
"""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sagacity import (
    Command,
    Context,
    Event,
    RecordsEvents,
    Saga,
    Service,
    State,
    handles,
    on,
    on_done,
)

# ---------------------------------------------------------------------------------------- messages


class CampaignActivated(Event, topic="campaigns"):
    campaign: str
    slogan: str


class SubmitAdvertisement(Command, topic="publishing"):
    campaign: str
    slogan: str


class PublishingConfirmed(Event, topic="publishing"):
    campaign: str
    confirmation: str


class PublishingRejected(Event, topic="publishing"):
    campaign: str
    reason: str


class TrackPublishingConfirmation(Command, topic="campaigns"):
    campaign: str
    confirmation: str


class TrackPublishingRejection(Command, topic="campaigns"):
    campaign: str
    reason: str


# -------------------------------------------------------------------------------------- the entity


class Tables(DeclarativeBase):
    pass


class Campaign(RecordsEvents, Tables):
    __tablename__ = "campaign"

    id: Mapped[str] = mapped_column(primary_key=True)
    slogan: Mapped[str]
    status: Mapped[str] = mapped_column(default="draft")
    note: Mapped[str] = mapped_column(default="")

    def activate(self) -> None:
        self.status = "activated"
        self.record(CampaignActivated(self.id, self.slogan))  # leaves with this entity's commit


# ---------------------------------------------------------------------------------------- the saga


class CampaignPublishing(Saga, key="campaign"):
    """Have an activated campaign published, and the campaign told what came of it."""

    submitting = State()
    tracking = State()
    done = State(final=True)

    campaign: str

    @on(CampaignActivated, starts=True, goto=submitting)
    def submit(self, event: CampaignActivated) -> None:
        self.send(SubmitAdvertisement(event.campaign, event.slogan))

    @on(PublishingConfirmed, when=submitting, goto=tracking)
    def confirm(self, event: PublishingConfirmed) -> None:
        self.send(TrackPublishingConfirmation(event.campaign, event.confirmation))

    @on(PublishingRejected, when=submitting, goto=tracking)
    def reject(self, event: PublishingRejected) -> None:
        self.send(TrackPublishingRejection(event.campaign, event.reason))

    @on_done(TrackPublishingConfirmation, TrackPublishingRejection, when=tracking, goto=done)
    def finish(self) -> None: ...


# --------------------------------------------------------------------------------- who does the work


@handles(SubmitAdvertisement)
async def submit_advertisement(
    command: SubmitAdvertisement,
) -> PublishingConfirmed | PublishingRejected:
    if "free money" in command.slogan.lower():
        return PublishingRejected(command.campaign, "misleading slogan")
    return PublishingConfirmed(command.campaign, f"ad-{command.campaign}")


@handles(TrackPublishingConfirmation)
async def track_confirmation(command: TrackPublishingConfirmation, context: Context) -> None:
    campaign = await context.session.get_one(Campaign, command.campaign)
    campaign.status, campaign.note = "published", command.confirmation


@handles(TrackPublishingRejection)
async def track_rejection(command: TrackPublishingRejection, context: Context) -> None:
    campaign = await context.session.get_one(Campaign, command.campaign)
    campaign.status, campaign.note = "rejected", command.reason


campaigns = Service(
    "campaigns", sagas=[CampaignPublishing], handlers=[track_confirmation, track_rejection]
)
publishing = Service("publishing", handlers=[submit_advertisement])
