"""One worker process: opens its servers, waits for them, runs the worker, and says how it ended."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final, Protocol

from sagacity.cli.exits import Exit
from sagacity.cli.stopping import Stoppable, Stopping
from sagacity.core.errors import ConfigurationError, SagacityError, SchemaError
from sagacity.ports import Bus
from sagacity.service import Service
from sagacity.worker.config import Settings
from sagacity.worker.health import HealthServer, Reporting, WorkerProbe
from sagacity.worker.opening import WholeStore, open_bus, open_store, until_reachable
from sagacity.worker.redaction import redacted
from sagacity.worker.worker import Worker

__all__ = ["Running", "serve"]

log = logging.getLogger(__name__)

CLOSING_S: Final = 5.0
"""How long connections may take to close; the operating system ends them anyway."""


class Running(Stoppable, Reporting, Protocol):
    """What the commands need of a worker."""

    async def run(self) -> None:
        """Works until it was stopped."""
        ...


async def serve(
    service: Service,
    settings: Settings,
    stopping: Stopping,
    *,
    create: bool = False,
    refuse_unsafe: bool = False,
    tell_unsafe: bool = True,
    started: Callable[[Running], None] | None = None,
) -> Exit:
    """Runs one worker until it is stopped.

    `create` makes missing tables. Settings of the bus that may lose messages are logged with
    `tell_unsafe`, and end the worker with `refuse_unsafe`. `started` is called with the worker before it runs. Errors that end a process are
    logged here and become its exit status.
    """
    stopping.enter_loop()
    try:
        async with AsyncExitStack() as stack:
            store = open_store(settings.store, service=service)
            stack.push_async_callback(_close, store)
            bus = open_bus(
                settings.bus, prefix=settings.prefix, payload_bytes_max=settings.payload_bytes_max
            )
            stack.push_async_callback(_close, bus)
            worker = Worker(service, store, bus, settings, consumer=settings.consumer)
            if settings.health_address is not None:
                probe = WorkerProbe(worker)
                await stack.enter_async_context(HealthServer(*settings.health_address, probe))
            if started is not None:
                started(worker)
            unsafe = await _reach(store, bus, settings, stopping, create)
            if tell_unsafe:
                for line in unsafe:
                    log.warning("Bus is set up unsafely", extra={"found": line})
            if refuse_unsafe:
                _refuse(unsafe)
            if not stopping.asked:
                stopping.attach(worker)
                # What the program is made of stays: no collection looks at it again. And a batch holds
                # thousands of records, none of which is in a cycle: look when there is more to find.
                gc.collect()
                gc.freeze()
                gc.set_threshold(50_000, 20, 20)
                await worker.run()
    except SchemaError as error:
        log.error("Schema does not fit", extra={"error": str(error)})  # noqa: TRY400 - told whole
        return Exit.SCHEMA
    except ConfigurationError as error:
        log.error("Configuration is wrong", extra={"error": str(error)})  # noqa: TRY400 - told whole
        return Exit.WRONG
    except asyncio.CancelledError:
        if not stopping.cut_short:
            raise
    except Exception:
        log.exception("Worker failed")
        return Exit.CUT_SHORT if stopping.cut_short else Exit.FAILED
    return _ended(stopping)


def _ended(stopping: Stopping) -> Exit:
    if stopping.cut_short:
        return Exit.CUT_SHORT
    if not stopping.asked:
        log.error("Worker ended without being asked to")
        return Exit.FAILED
    log.info("Stopped, nothing is left undone")
    return Exit.DONE


async def _reach(
    store: WholeStore, bus: Bus, settings: Settings, stopping: Stopping, create: bool
) -> list[str]:
    """Waits for both servers; returns what is unsafe about the bus."""
    stop = stopping.requested
    where = redacted(settings.store)
    await until_reachable("store", where, lambda: store.prepare(create=create), stopping=stop)
    where = redacted(settings.bus)
    return await until_reachable("bus", where, bus.check, stopping=stop) or []


def _refuse(unsafe: list[str]) -> None:
    if unsafe:
        raise ConfigurationError(
            f"--refuse-unsafe: expected a bus that cannot lose messages, got {'; '.join(unsafe)}; "
            "change the server's configuration"
        )


async def _close(server: WholeStore | Bus) -> None:
    try:
        async with asyncio.timeout(CLOSING_S):
            await server.close()
    except (TimeoutError, OSError, SagacityError) as error:
        log.warning("Connections did not close in order", extra={"error": str(error)})
