"""The accounts service; `saga-worker examples.batch_import.accounts.service:service`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx

from examples.batch_import.accounts.calls import Remotes
from examples.batch_import.accounts.handlers import HANDLERS
from examples.batch_import.accounts.sagas import AccountSaga
from examples.batch_import.accounts_api import accounts_api
from examples.batch_import.messages import (
    OrderAccountsFailed,
    OrderAccountsReady,
    RemoteAccountRefused,
    RemoteAccountReleased,
    RemoteReleaseFailed,
)
from examples.batch_import.remotes import SYSTEMS
from examples.batch_import.surroundings import remote_surroundings
from sagacity import Service


@asynccontextmanager
async def lifespan(_service: Service) -> AsyncGenerator[Remotes]:
    """The clients of the remote systems, with one pool of connections."""
    around = remote_surroundings(SYSTEMS)
    async with httpx.AsyncClient(timeout=around.timeout_s, trust_env=False) as client:
        apis = {system: accounts_api(system, client, url) for system, url in around.urls.items()}
        yield Remotes(apis, around.timeout_s)


service = Service(
    "accounts",
    sagas=[AccountSaga],
    handlers=HANDLERS,
    messages=[
        OrderAccountsFailed,
        OrderAccountsReady,
        RemoteAccountRefused,
        RemoteAccountReleased,
        RemoteReleaseFailed,
    ],
    lifespan=lifespan,
)
