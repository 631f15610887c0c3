"""Two ways in, HTTP and a command line. What they do is `HailRide`; they only translate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy.ext.asyncio import async_sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.hail_ride.hailing import HailRide
from examples.hail_ride.messages import CouldNotHail, RideHailed
from sagacity.backends.sql.session import SagaSession
from sagacity.listeners import Listeners

Sessions = async_sessionmaker[SagaSession]


def http(sessions: Sessions, application: Listeners) -> Starlette:
    async def hail(request: Request) -> JSONResponse:
        asked = await request.json()
        answer = JSONResponse({}, 409)

        def accepted(event: RideHailed) -> None:
            nonlocal answer
            answer = JSONResponse({"ride": event.ride}, 202)

        def refused(event: CouldNotHail) -> None:
            nonlocal answer
            answer = JSONResponse({"reason": event.reason}, 422)

        run = HailRide(sessions).on(RideHailed, accepted).on(CouldNotHail, refused)
        await run.announcing_to(application)(asked["ride"], asked["passenger"], asked["pickup"])
        return answer

    return Starlette(routes=[Route("/rides", hail, methods=["POST"])])


async def command_line(
    arguments: Sequence[str], sessions: Sessions, application: Listeners
) -> list[str]:
    parser = argparse.ArgumentParser(prog="hail")
    parser.add_argument("passenger")
    parser.add_argument("pickup")
    parser.add_argument("--ride", default=uuid4().hex)
    asked = parser.parse_args(arguments)
    lines: list[str] = []
    run = (
        HailRide(sessions)
        .on(RideHailed, lambda event: lines.append(f"{event.passenger}: looking for a driver"))
        .on(CouldNotHail, lambda event: lines.append(f"{event.passenger}: {event.reason}"))
    )
    await run.announcing_to(application)(asked.ride, asked.passenger, asked.pickup)
    return lines
