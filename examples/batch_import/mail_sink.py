"""A mail server that keeps every mail it accepts, for tests and demonstrations.

`python -m examples.batch_import.mail_sink --store mails.sqlite` prints
`{"name": "mail-sink", "smtp_host": ..., "smtp_port": ..., "url": ..., "pid": ...}` on standard output
once it can be reached. Over HTTP at `url`: `GET /mails` (all, or those `?to=` an address, oldest first)
and `GET` and `PUT /faults` (see `faults.Rule`; the kinds are rcpt and data, matched by `to`). Actions:
temporary (451), permanent (550), drop-reply (the mail is kept, then the connection closes without an
answer) and timeout (the mail is not kept and no answer comes).
"""

import asyncio
import json
import sqlite3
from collections.abc import Mapping
from email import message_from_bytes
from email.policy import default as modern
from pathlib import Path
from typing import Final

import click
from aiosmtpd.smtp import SMTP, Envelope, Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from examples.batch_import.faults import FaultPlan, json_response
from examples.batch_import.serving import (
    LOOPBACK,
    announce,
    end_with_stdin,
    listen,
    now_us,
    port_of,
    serve_http,
)

ACTIONS: Final[Mapping[str, frozenset[str]]] = {
    "temporary": frozenset({"rcpt", "data"}),
    "permanent": frozenset({"rcpt", "data"}),
    "drop-reply": frozenset({"data"}),
    "timeout": frozenset({"data"}),
}
_REFUSALS: Final = {
    "temporary": "451 4.3.0 try again later",
    "permanent": "550 5.1.1 no such mailbox",
}
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS mail (
    seq INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, sender TEXT NOT NULL, recipients TEXT NOT NULL,
    message_id TEXT, raw BLOB NOT NULL
)
"""


class MailStore:
    """The accepted mails, durable before they are acknowledged."""

    def __init__(self, path: str | Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(_SCHEMA)

    def add(self, sender: str, recipients: list[str], raw: bytes) -> None:
        message_id = message_from_bytes(raw, policy=modern)["Message-ID"]
        self._db.execute(
            "INSERT INTO mail (at_us, sender, recipients, message_id, raw) VALUES (?, ?, ?, ?, ?)",
            (
                now_us(),
                sender,
                json.dumps(recipients),
                None if message_id is None else str(message_id),
                raw,
            ),
        )

    def mails(self, recipient: str | None = None) -> list[dict[str, object]]:
        rows = self._db.execute(
            "SELECT seq, at_us, sender, recipients, message_id, raw FROM mail ORDER BY seq"
        )
        found: list[dict[str, object]] = []
        for seq, at_us, sender, recipients, message_id, raw in rows:
            to: list[str] = json.loads(recipients)
            if recipient is None or recipient in to:
                found.append(
                    {
                        "seq": seq,
                        "at_us": at_us,
                        "from": sender,
                        "to": to,
                        "message_id": message_id,
                        "raw": raw.decode("utf-8", "replace"),
                    }
                )
        return found


class Sink:
    """The mail server's behaviour: keep, unless the fault plan wants otherwise."""

    def __init__(self, store: MailStore) -> None:
        self.store = store
        self.faults = FaultPlan(ACTIONS)

    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/mails", self._show, methods=["GET"]), *self.faults.routes()]
        )

    # aiosmtpd finds these by name and takes the returned line as the answer.

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        rcpt_options: list[str],
    ) -> str:
        del server, session
        struck = self.faults.take("rcpt", {"to": address})
        if struck is not None:
            return _REFUSALS[struck.rule.action]
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(rcpt_options)
        return "250 OK"

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        del session
        recipients = [str(address) for address in envelope.rcpt_tos]
        raw = envelope.content
        assert isinstance(raw, bytes)
        struck = self.faults.take("data", {"to": recipients[0]})
        if struck is not None and struck.rule.action in _REFUSALS:
            return _REFUSALS[struck.rule.action]
        if struck is not None and struck.rule.action == "timeout":
            await self.faults.wait(struck)
        else:
            self.store.add(str(envelope.mail_from), recipients, raw)
        if struck is not None:
            assert isinstance(server.transport, asyncio.WriteTransport)
            server.transport.abort()
            await asyncio.Event().wait()  # aiosmtpd cancels this task when the connection is gone
        return "250 OK kept"

    async def _show(self, request: Request) -> Response:
        return json_response(self.store.mails(request.query_params.get("to")))


async def serve(sink: Sink, smtp_port: int, http_port: int) -> None:
    """Serve SMTP and HTTP on loopback until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    smtp_listener, http_listener = listen(smtp_port), listen(http_port)

    def session() -> SMTP:
        return SMTP(sink, hostname="mail-sink", enable_SMTPUTF8=True, loop=loop)

    server = await loop.create_server(session, sock=smtp_listener)
    announce(
        {
            "name": "mail-sink",
            "smtp_host": LOOPBACK,
            "smtp_port": port_of(smtp_listener),
            "url": f"http://{LOOPBACK}:{port_of(http_listener)}",
        }
    )
    try:
        await serve_http(sink.app(), http_listener)
    finally:
        server.close()


@click.command()
@click.option("--store", type=click.Path(dir_okay=False), required=True, help="SQLite file.")
@click.option("--smtp-port", type=click.IntRange(0, 65535), default=0, help="0 takes a free one.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=0, help="0 takes a free one.")
@click.option("--until-stdin-closes", is_flag=True, help="End with the starter's pipe.")
def main(store: str, smtp_port: int, http_port: int, until_stdin_closes: bool) -> None:
    """Keep all mail sent to the SMTP port."""
    if until_stdin_closes:
        end_with_stdin()
    asyncio.run(serve(Sink(MailStore(store)), smtp_port, http_port))


if __name__ == "__main__":
    main()
