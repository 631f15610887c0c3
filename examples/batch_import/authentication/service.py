"""The authentication service; `saga-worker examples.batch_import.authentication.service:service`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from examples.batch_import.authentication.handlers import HANDLERS
from examples.batch_import.authentication.sagas import OptInSaga
from examples.batch_import.messages import ConfirmationRefused, OptInPending
from examples.batch_import.surroundings import MailSurroundings, mail_surroundings
from sagacity import Service


@asynccontextmanager
async def lifespan(_service: Service) -> AsyncGenerator[MailSurroundings]:
    """What handlers find as `context.state`: where the mail gateway is, and how long a cycle is."""
    yield mail_surroundings()


service = Service(
    "authentication",
    sagas=[OptInSaga],
    handlers=HANDLERS,
    messages=[ConfirmationRefused, OptInPending],
    lifespan=lifespan,
)
