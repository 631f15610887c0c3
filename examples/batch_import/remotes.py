"""Three remote systems that open accounts, each with its own idea of idempotency.

`python -m examples.batch_import.remotes billing --port 0 --ledger billing.sqlite` serves one of them
and prints `{"name": ..., "url": ..., "pid": ...}` on standard output once it can be reached.

| System   | Create                                   | The same create again                        |
|----------|------------------------------------------|----------------------------------------------|
| billing  | `POST /accounts` with `Idempotency-Key`  | the first answer with 200; other data: 409   |
| shipping | `PUT /accounts/{id}`, the client's id    | 200; other data: 409                         |
| loyalty  | `POST /accounts`                         | a second account: look before you create     |

All: `GET /accounts?external_ref=` (live ones), `GET` and `DELETE /accounts/{id}` (404 once it is gone).
The body of a create is `{"external_ref": ..., "plan": ...}`; the answer adds `id`.

For tests: `GET /ledger` (every account made or deleted, in microseconds), `GET /calls` (every request
answered or dropped), `GET` and `PUT /faults` (see `faults.Rule`; the kinds are create, delete and
find, to be matched by `user`, `plan`, `account` and `key`). Actions: refuse (422), conflict (409),
unavailable (503), rate-limit (429), timeout (nothing is done and no answer comes), drop-reply (all is
done, then the connection closes) and hold (all is done, the answer waits until the plan is replaced).
"""

import asyncio
import sqlite3
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import click
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from examples.batch_import.faults import FaultPlan, RuleState, json_response
from examples.batch_import.serving import (
    LOOPBACK,
    NoReply,
    announce,
    disconnection,
    end_with_stdin,
    listen,
    now_us,
    port_of,
    serve_http,
)

SYSTEMS: Final = ("billing", "shipping", "loyalty")
_ALL: Final = frozenset({"create", "delete", "find"})
_CHANGES: Final = frozenset({"create", "delete"})
ACTIONS: Final[Mapping[str, frozenset[str]]] = {
    "refuse": _CHANGES,
    "conflict": _CHANGES,
    "unavailable": _ALL,
    "rate-limit": _ALL,
    "timeout": _ALL,
    "drop-reply": _ALL,
    "hold": _ALL,
}
_REFUSALS: Final = {
    "refuse": (422, "refused"),
    "conflict": (409, "conflicting data"),
    "unavailable": (503, "unavailable"),
    "rate-limit": (429, "too many requests"),
}

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS account (
    id TEXT NOT NULL, external_ref TEXT NOT NULL, plan TEXT, key TEXT UNIQUE,
    live INTEGER NOT NULL DEFAULT 1
);
CREATE UNIQUE INDEX IF NOT EXISTS one_live_id ON account (id) WHERE live;
CREATE INDEX IF NOT EXISTS by_external_ref ON account (external_ref);
CREATE TABLE IF NOT EXISTS ledger (
    seq INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, operation TEXT NOT NULL,
    account TEXT NOT NULL, external_ref TEXT NOT NULL, plan TEXT, key TEXT
);
CREATE TRIGGER IF NOT EXISTS ledger_keeps BEFORE UPDATE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER IF NOT EXISTS ledger_grows BEFORE DELETE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TABLE IF NOT EXISTS call (
    seq INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, operation TEXT NOT NULL,
    external_ref TEXT, account TEXT, key TEXT, status INTEGER, fault TEXT
);
"""


class Wanted(msgspec.Struct, frozen=True):
    """The body of a create."""

    external_ref: str
    plan: str | None = None


class Account(NamedTuple):
    """An account as the ledger's file knows it."""

    id: str
    external_ref: str
    plan: str | None
    key: str | None
    live: int

    def public(self) -> dict[str, str | None]:
        return {"id": self.id, "external_ref": self.external_ref, "plan": self.plan}


class Ledger:
    """The remote's durable memory. Its calls block for one small commit, which keeps them atomic."""

    def __init__(self, path: str | Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)

    def create(self, account_id: str, wanted: Wanted, key: str | None = None) -> Account:
        """Open an account and enter it in the ledger, in one transaction."""
        values = (account_id, wanted.external_ref, wanted.plan, key)
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            self._db.execute(
                "INSERT INTO account (id, external_ref, plan, key) VALUES (?, ?, ?, ?)", values
            )
            self._enter("create", *values)
        return Account(*values, live=1)

    def delete(self, account: Account) -> None:
        """Close a live account and enter that in the ledger, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            self._db.execute("UPDATE account SET live = 0 WHERE id = ? AND live", (account.id,))
            self._enter("delete", account.id, account.external_ref, account.plan, account.key)

    def live(self, account_id: str) -> Account | None:
        return self._one("id = ? AND live", account_id)

    def with_key(self, key: str) -> Account | None:
        return self._one("key = ?", key)

    def find(self, external_ref: str | None) -> list[Account]:
        """Return the live accounts of one external reference, or all, oldest first."""
        rows = self._db.execute(
            "SELECT id, external_ref, plan, key, live FROM account"
            " WHERE live AND coalesce(external_ref = ?, 1) ORDER BY rowid",
            (external_ref,),
        )
        return [Account(*row) for row in rows]

    def note_call(
        self, operation: str, about: Mapping[str, str | None], status: int | None, fault: str | None
    ) -> None:
        self._db.execute(
            "INSERT INTO call (at_us, operation, external_ref, account, key, status, fault)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                now_us(),
                operation,
                about.get("user"),
                about.get("account"),
                about.get("key"),
                status,
                fault,
            ),
        )

    def rows(self, table: str) -> list[dict[str, object]]:
        cursor = self._db.execute(f"SELECT * FROM {table} ORDER BY seq")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def _one(self, condition: str, value: str) -> Account | None:
        row = self._db.execute(
            f"SELECT id, external_ref, plan, key, live FROM account WHERE {condition}", (value,)
        ).fetchone()
        return None if row is None else Account(*row)

    def _enter(self, operation: str, *values: str | None) -> None:
        self._db.execute(
            "INSERT INTO ledger (at_us, operation, account, external_ref, plan, key)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (now_us(), operation, *values),
        )


class Remote:
    """One remote system: its ledger, its fault plan and its HTTP surface."""

    def __init__(self, name: str, ledger: Ledger) -> None:
        self.name = name
        self.ledger = ledger
        self.faults = FaultPlan(ACTIONS)

    def app(self) -> Starlette:
        if self.name == "shipping":
            create = Route("/accounts/{id}", self._put, methods=["PUT"])
        else:
            create = Route("/accounts", self._post, methods=["POST"])
        return Starlette(
            routes=[
                create,
                Route("/accounts", self._find, methods=["GET"]),
                Route("/accounts/{id}", self._get, methods=["GET"]),
                Route("/accounts/{id}", self._delete, methods=["DELETE"]),
                Route("/ledger", self._show_ledger, methods=["GET"]),
                Route("/calls", self._show_calls, methods=["GET"]),
                *self.faults.routes(),
            ]
        )

    async def _post(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=Wanted)
        except msgspec.DecodeError as error:
            return json_response({"error": str(error)}, 400)
        key = request.headers.get("idempotency-key") if self.name == "billing" else None
        if self.name == "billing" and not key:
            return json_response({"error": "the header Idempotency-Key is missing"}, 400)
        about = {"user": wanted.external_ref, "plan": wanted.plan, "key": key}
        return await self._answer(request, "create", about, lambda: self._open(wanted, key))

    def _open(self, wanted: Wanted, key: str | None) -> Response:
        earlier = self.ledger.with_key(key) if key is not None else None
        if earlier is not None:
            if (earlier.external_ref, earlier.plan) != (wanted.external_ref, wanted.plan):
                return json_response({"error": "the key was used with other data"}, 409)
            if not earlier.live:
                return json_response({"error": "the account made with this key is gone"}, 409)
            return json_response(earlier.public())
        account = self.ledger.create(f"{self.name}-{uuid.uuid4().hex}", wanted, key)
        return json_response(account.public(), 201)

    async def _put(self, request: Request) -> Response:
        account_id: str = request.path_params["id"]
        try:
            wanted = msgspec.json.decode(await request.body(), type=Wanted)
        except msgspec.DecodeError as error:
            return json_response({"error": str(error)}, 400)
        about = {"user": wanted.external_ref, "plan": wanted.plan, "account": account_id}
        return await self._answer(
            request, "create", about, lambda: self._ensure(account_id, wanted)
        )

    def _ensure(self, account_id: str, wanted: Wanted) -> Response:
        present = self.ledger.live(account_id)
        if present is None:
            return json_response(self.ledger.create(account_id, wanted).public(), 201)
        if (present.external_ref, present.plan) != (wanted.external_ref, wanted.plan):
            return json_response({"error": "the account exists with other data"}, 409)
        return json_response(present.public())

    async def _find(self, request: Request) -> Response:
        external_ref = request.query_params.get("external_ref")

        def search() -> Response:
            return json_response([account.public() for account in self.ledger.find(external_ref)])

        return await self._answer(request, "find", {"user": external_ref}, search)

    async def _get(self, request: Request) -> Response:
        account = self.ledger.live(request.path_params["id"])

        def show() -> Response:
            if account is None:
                return json_response({"error": "no such account"}, 404)
            return json_response(account.public())

        return await self._answer(request, "find", self._about(request, account), show)

    async def _delete(self, request: Request) -> Response:
        account_id: str = request.path_params["id"]

        def close() -> Response:
            account = self.ledger.live(account_id)  # again: a fault may have let time pass
            if account is None:
                return json_response({"error": "no such account"}, 404)
            self.ledger.delete(account)
            return Response(status_code=204)

        about = self._about(request, self.ledger.live(account_id))
        return await self._answer(request, "delete", about, close)

    def _about(self, request: Request, account: Account | None) -> dict[str, str | None]:
        about: dict[str, str | None] = {"account": request.path_params["id"]}
        if account is not None:
            about.update(user=account.external_ref, plan=account.plan, key=account.key)
        return about

    async def _answer(
        self,
        request: Request,
        operation: str,
        about: Mapping[str, str | None],
        work: Callable[[], Response],
    ) -> Response:
        """Do the work and answer, unless the fault plan wants otherwise."""
        struck = self.faults.take(operation, about)
        if struck is None:
            response = work()
            self.ledger.note_call(operation, about, response.status_code, None)
            return response
        action = struck.rule.action
        if action in _REFUSALS:
            status, error = _REFUSALS[action]
            self.ledger.note_call(operation, about, status, action)
            return json_response({"error": error}, status)
        if action == "timeout":
            self.ledger.note_call(operation, about, None, action)
            await self._until_gone(request, struck)
            return NoReply()
        response = work()
        self.ledger.note_call(operation, about, response.status_code, action)
        if action == "drop-reply":
            return NoReply()
        await self.faults.wait(struck)  # hold
        return response

    async def _until_gone(self, request: Request, struck: RuleState) -> None:
        async with disconnection(request.receive) as gone:
            struck.waiting += 1
            await asyncio.wait({gone}, timeout=struck.rule.seconds)
            struck.waiting -= 1

    async def _show_ledger(self, _request: Request) -> Response:
        return json_response(self.ledger.rows("ledger"))

    async def _show_calls(self, _request: Request) -> Response:
        return json_response(self.ledger.rows("call"))


@click.command()
@click.argument("name", type=click.Choice(SYSTEMS))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 takes a free one.")
@click.option("--ledger", type=click.Path(dir_okay=False), required=True, help="SQLite file.")
@click.option("--until-stdin-closes", is_flag=True, help="End with the starter's pipe.")
def main(name: str, port: int, ledger: str, until_stdin_closes: bool) -> None:
    """Serve the remote system NAME on loopback."""
    app = Remote(name, Ledger(ledger)).app()
    listener = listen(port)
    if until_stdin_closes:
        end_with_stdin()
    announce({"name": name, "url": f"http://{LOOPBACK}:{port_of(listener)}"})
    asyncio.run(serve_http(app, listener))


if __name__ == "__main__":
    main()
