"""What the three services say to each other, and nothing else that they share.

A command's topic is the address of the service that handles it. Every event travels on the topic of
the context it is a fact of.
"""

from __future__ import annotations

from datetime import datetime

from sagacity import Command, Event

# --------------------------------------------------------------------- the importing service


class ReceiveBatch(Command, topic="importing"):
    """Take note of a file that was handed in; the same file twice is one batch."""

    batch_id: str
    path: str
    digest: str


class StageBatch(Command, topic="importing"):
    """Read the whole file into staging rows, or refuse it as a whole."""

    batch_id: str
    path: str


class ApplyChunk(Command, topic="importing"):
    """Apply staged records number `chunk` * 500 and up to 500 in all, in one transaction."""

    batch_id: str
    chunk: int


class FinishBatch(Command, topic="importing"):
    """Write the report of a batch whose chunks are all applied."""

    batch_id: str


class DiscardStaging(Command, topic="importing"):
    """Undo of StageBatch: forget the staged records of a batch that was not applied."""

    batch_id: str


class BatchReceived(Event, topic="batches"):
    """A file is known by id and digest, and waits to be staged."""

    batch_id: str
    path: str
    digest: str


class BatchStaged(Event, topic="batches"):
    """Every record of the file is a staging row; nothing else has changed."""

    batch_id: str
    chunks: int
    records: int


class ChunkApplied(Event, topic="batches"):
    """One chunk of records is applied."""

    batch_id: str
    chunk: int


class RecordRefused(Event, topic="batches"):
    """One record of a batch is in quarantine; the rest goes on."""

    batch_id: str
    line: int
    kind: str
    ref: str
    reason: str


class BatchImported(Event, topic="batches"):
    """The batch is done."""

    batch_id: str
    applied: int
    stale: int
    refused: int


class BatchRejected(Event, topic="batches"):
    """The file as a whole was refused; no user and no order has changed."""

    batch_id: str
    line: int
    reason: str


class UserImported(Event, topic="users"):
    """A user was seen for the first time."""

    user_ref: str
    email: str


class UserDetailsChanged(Event, topic="users"):
    """Fields of a known user changed that concern nobody's e-mail."""

    user_ref: str
    fields: list[str]


class UserEmailChanged(Event, topic="users"):
    """The address of a known user changed; the new one is not confirmed."""

    user_ref: str
    email: str
    version: int = 0
    """`users.version` with this address: an address of a lower version is an older one."""


class OrderImported(Event, topic="orders"):
    """An order was seen for the first time."""

    order_ref: str
    user_ref: str


class OrderStatusChanged(Event, topic="orders"):
    """The status of a known order changed."""

    order_ref: str
    status: str


class OrderCancelled(Event, topic="orders"):
    """A known order was cancelled."""

    order_ref: str


class AccountsNeeded(Event, topic="orders"):
    """An order asks for accounts in remote systems. Nobody knows here whether its user may."""

    order_ref: str
    user_ref: str
    email: str
    systems: list[str]
    plans: list[str]
    """Plan of each system, "" where the order names none."""
    version: int = 0
    """`users.version` of the user with this address."""


# ---------------------------------------------------------------- the authentication service


class RequestOptIn(Command, topic="authentication"):
    """Make sure that the user is asked to confirm the address, once per address.

    Answered with EmailConfirmed where it is confirmed already, with OptInMailRefused where no mail
    can reach it, else with OptInPending.
    """

    user_ref: str
    email: str
    version: int = 0
    """`users.version` with this address; an older one does not replace what is known."""


class SendOptInMail(Command, topic="authentication"):
    """Send the mail of one opt-in cycle. The same cycle always sends the same mail."""

    user_ref: str
    cycle: int


class RemindOptIn(Command, topic="authentication"):
    """Send the mail of a cycle once more, because nobody has confirmed."""

    user_ref: str
    cycle: int


class ConfirmEmail(Command, topic="authentication"):
    """Somebody followed the link and pressed the button. Wrong and old tokens are refused."""

    token: str


class ExpireOptIn(Command, topic="authentication"):
    """The time to confirm is over; the token of this cycle is void."""

    user_ref: str
    cycle: int


class OptInRequested(Event, topic="authentication.events"):
    """A new opt-in cycle began: said once for each cycle."""

    user_ref: str
    cycle: int
    expires_at: datetime
    remind_at: datetime | None = None


class OptInPending(Event, topic="authentication.events"):
    """The answer to RequestOptIn while nobody has confirmed the address yet."""

    user_ref: str
    cycle: int


class OptInMailSent(Event, topic="authentication.events"):
    """The mail of a cycle was accepted by the mail gateway."""

    user_ref: str
    cycle: int


class OptInMailRefused(Event, topic="authentication.events"):
    """The mail gateway refused the mail for good."""

    user_ref: str
    cycle: int
    reason: str


class EmailConfirmed(Event, topic="authentication.events"):
    """The user has confirmed the address. From now on accounts may be made."""

    user_ref: str
    email: str
    version: int = 0
    """`users.version` up to which this address is known to be the user's."""
    cycle: int = 0


class ConfirmationRefused(Event, topic="authentication.events"):
    """Somebody used a token that is wrong, old or expired; nothing has changed."""

    reason: str
    user_ref: str = ""
    """Whose token it was, where that is known."""


class OptInExpired(Event, topic="authentication.events"):
    """Nobody confirmed in time; the token is void."""

    user_ref: str
    cycle: int


# ---------------------------------------------------------------------- the accounts service


class RequireAccounts(Command, topic="accounts"):
    """Write down which accounts an order holds on to."""

    order_ref: str
    user_ref: str
    systems: list[str]


class CreateRemoteAccount(Command, abstract=True):
    """Make sure that the user's account in one system exists, for this order too.

    Each system has a topic of its own: an order's commands to one topic are handled one after the
    other, and no system shall wait for another.
    """

    order_ref: str
    user_ref: str
    plan: str


class ReleaseRemoteAccount(Command, abstract=True):
    """Undo of CreateRemoteAccount: drop this order's hold; the last one deletes the account."""

    order_ref: str
    user_ref: str


class CreateBillingAccount(CreateRemoteAccount, topic="accounts.billing"):
    """`CreateRemoteAccount` in billing."""


class ReleaseBillingAccount(ReleaseRemoteAccount, topic="accounts.billing"):
    """`ReleaseRemoteAccount` in billing."""


class CreateShippingAccount(CreateRemoteAccount, topic="accounts.shipping"):
    """`CreateRemoteAccount` in shipping."""


class ReleaseShippingAccount(ReleaseRemoteAccount, topic="accounts.shipping"):
    """`ReleaseRemoteAccount` in shipping."""


class CreateLoyaltyAccount(CreateRemoteAccount, topic="accounts.loyalty"):
    """`CreateRemoteAccount` in loyalty."""


class ReleaseLoyaltyAccount(ReleaseRemoteAccount, topic="accounts.loyalty"):
    """`ReleaseRemoteAccount` in loyalty."""


class MarkOrderReady(Command, topic="accounts"):
    """All accounts of the order exist."""

    order_ref: str


class BlockOrder(Command, topic="accounts"):
    """The order gets no accounts; `outcome` is failed or cancelled."""

    order_ref: str
    outcome: str
    reason: str


class RemoteAccountCreated(Event, topic="accounts.events"):
    """An order's hold on an account is active."""

    order_ref: str
    user_ref: str
    system: str
    remote_id: str


class RemoteAccountRefused(Event, topic="accounts.events"):
    """A remote system refuses an account for good."""

    order_ref: str
    user_ref: str
    system: str
    reason: str


class RemoteAccountReleased(Event, topic="accounts.events"):
    """An order's hold is gone; `deleted` tells whether the account went with it."""

    order_ref: str
    user_ref: str
    system: str
    deleted: bool


class RemoteReleaseFailed(Event, topic="accounts.events"):
    """An account could not be released; somebody must look."""

    order_ref: str
    user_ref: str
    system: str
    reason: str


class OrderAccountsReady(Event, topic="accounts.events"):
    """All accounts an order asked for exist."""

    order_ref: str


class OrderAccountsFailed(Event, topic="accounts.events"):
    """An order holds no accounts; `outcome` is failed or cancelled."""

    order_ref: str
    outcome: str
    reason: str
