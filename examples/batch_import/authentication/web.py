"""The page that the link of an opt-in mail leads to.

`python -m examples.batch_import.authentication.web --store URL` prints `{"name": ..., "url": ...,
"pid": ...}` once it can be reached. `GET /confirm/TOKEN` shows a button and changes nothing, for mail
scanners follow links; `POST` accepts the confirmation. Accepting is a row in the outbox of the
service's own database: the answer does not wait for what follows.
"""

import asyncio
from html import escape
from typing import Final

import click
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from examples.batch_import.authentication.tables import PENDING, OptIn, OptInState
from examples.batch_import.authentication.tokens import token_hash
from examples.batch_import.messages import ConfirmEmail
from examples.batch_import.sending import send_by
from examples.batch_import.serving import (
    LOOPBACK,
    announce,
    end_with_stdin,
    listen,
    now_us,
    port_of,
    serve_http,
)
from sagacity.backends.sql import SqlStore

TOKEN_LENGTH_MAX: Final = 100
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'",
}
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<h1>{title}</h1>
{content}
</html>
"""
_BUTTON: Final = '<form method="post"><button>Yes, this address is mine</button></form>'


class ConfirmPage:
    """The page, on the store of the authentication service; the caller closes it."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store

    def app(self) -> Starlette:
        path = "/confirm/{token}"
        return Starlette(
            routes=[
                Route(path, self.show, methods=["GET"]),
                Route(path, self.confirm, methods=["POST"]),
            ]
        )

    async def show(self, request: Request) -> Response:
        """Say what the token is good for."""
        match await self._state(request.path_params["token"]):
            case None:
                return _page("This link is unknown", "Please take it from your latest mail.", 404)
            case OptInState.CONFIRMED:
                return _page("Thank you", "Your address is confirmed.")
            case OptInState.SUPERSEDED:
                return _page("This link is old", "Please take the one in your latest mail.", 410)
            case state if state in PENDING:
                return _page("Please confirm your address", _BUTTON)
            case _:
                return _page("This link is void", "The time to confirm is over.", 410)

    async def confirm(self, request: Request) -> Response:
        """Accept the confirmation; whether the token is good is found out by the service."""
        token: str = request.path_params["token"]
        if len(token) > TOKEN_LENGTH_MAX:
            return _page("This link is unknown", "Please take it from your latest mail.", 404)
        await send_by(
            self._store, [ConfirmEmail(token)], source="authentication.web", actor="confirm page"
        )
        return _page("Thank you", "Your answer was received.", 202)

    async def _state(self, token: str) -> OptInState | None:
        wanted = select(OptIn.state, OptIn.expires_at).where(OptIn.token_hash == token_hash(token))
        async with self._store.engine.connect() as connection:
            await connection.execution_options(sagacity_read_only=True)
            row = (await connection.execute(wanted)).one_or_none()
        if row is None:
            return None
        state = OptInState(row.state)
        return OptInState.EXPIRED if state in PENDING and row.expires_at <= now_us() else state


def _page(title: str, content: str, status: int = 200) -> Response:
    shown = content if content is _BUTTON else f"<p>{escape(content)}</p>"
    text = _PAGE.format(title=escape(title), content=shown)
    return HTMLResponse(text, status, headers=_HEADERS)


async def serve(store_url: str, port: int) -> None:
    """Serve the page on loopback until SIGTERM or SIGINT."""
    store = SqlStore(store_url)
    listener = listen(port)
    announce({"name": "confirm", "url": f"http://{LOOPBACK}:{port_of(listener)}"})
    try:
        await serve_http(ConfirmPage(store).app(), listener)
    finally:
        await store.close()


@click.command()
@click.option("--store", required=True, help="Database URL of the authentication service.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 takes a free one.")
@click.option("--until-stdin-closes", is_flag=True, help="End with the starter's pipe.")
def main(store: str, port: int, until_stdin_closes: bool) -> None:
    """Serve the confirm page."""
    if until_stdin_closes:
        end_with_stdin()
    asyncio.run(serve(store, port))


if __name__ == "__main__":
    main()
