"""The whole example as OS processes: workers, confirm page, remote systems, mail sink.

`Program` starts them, tells each where the others are, and ends them. Redis and the databases are
the caller's. Every process ends with this one, however this one ends.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

from examples.batch_import import surroundings
from examples.batch_import.checking import Verdict, check_all, held_up
from examples.batch_import.contexts import SERVICES, tables_of
from examples.batch_import.loading import Receipt, submit
from examples.batch_import.mail import link_in
from examples.batch_import.place import Place
from examples.batch_import.processes import (
    ROOT,
    Started,
    StartFailed,
    start_mail_sink,
    start_remote,
)
from examples.batch_import.quiet import until_quiet
from examples.batch_import.reading import read_rows, table_named
from examples.batch_import.remotes import SYSTEMS
from examples.batch_import.status import BatchReport, Convergence, convergence, read_report
from sagacity.backends.sql import SqlStore

_local: Final = httpx.Client(verify=False, trust_env=False, timeout=10)
"""Loopback only; a client that loads certificates takes long to make."""


class Worker:
    """A running `saga-worker` of one service."""

    def __init__(self, service: str, environment: Mapping[str, str], log: Path) -> None:
        self.service = service
        self.log = log
        self._port = _free_port()
        self._asked = False
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "examples.batch_import.worker",
                    f"examples.batch_import.{service}.service:service",
                    "--health",
                    f"127.0.0.1:{self._port}",
                ],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,  # never written: its closing is the end
                stdout=stderr,
                stderr=stderr,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ready(self) -> bool:
        """Whether it has joined its group; raises StartFailed if it has ended."""
        if not self.running:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise StartFailed(
                f"the worker of {self.service} ended with {self._process.returncode}:\n{tail}"
            )
        try:
            return _local.get(f"http://127.0.0.1:{self._port}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    def terminate(self) -> None:
        """Ask it to finish what has begun and to end."""
        if not self._asked:  # a second time would cut it short
            self._asked = True
            self._process.terminate()

    def stop(self, deadline: float = 20.0) -> int:
        """End it in good order, by force after `deadline` seconds; return its exit code."""
        self.terminate()
        try:
            self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._reaped()

    def kill(self) -> int:
        """End it as a crash would (SIGKILL)."""
        self._process.kill()
        return self._reaped()

    def _reaped(self) -> int:
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code


class Program:
    """The example, running between `start` and `stop`.

    `stores` maps each service to the URL of its own database, `bus` is the URL of a Redis whose
    names begin with `prefix`. `settings` are further environment variables of the workers:
    `SAGACITY_*` and those of `surroundings`. `workers` is the number of processes per service. Files
    (ledgers, mails, logs) go into `directory`. `services` leaves some services out.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stores: Mapping[str, str],
        bus: str,
        prefix: str = "batch-import",
        settings: Mapping[str, str] | None = None,
        workers: int = 1,
        services: tuple[str, ...] = SERVICES,
    ) -> None:
        self.directory = directory
        self.stores = {service: stores[service] for service in services}
        self.bus = bus
        self.prefix = prefix
        self.settings = dict(settings or {})
        self.services = services
        self.workers: dict[str, list[Worker]] = {service: [] for service in services}
        self.remotes: dict[str, Started] = {}
        self.sink: Started | None = None
        self.web: Started | None = None
        self._number = workers
        self._secret = secrets.token_hex(16)
        self._http = _local

    # ------------------------------------------------------------------------------ start and stop

    def start(self, deadline: float = 60.0) -> Self:
        """Make the tables, start everything, and return when all workers have joined."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(self._make_tables())
            for system in SYSTEMS:
                self.remotes[system] = start_remote(system, self.ledger_file(system))
            self.sink = start_mail_sink(self.mail_file)
            if "authentication" in self.services:
                self.web = self._start_web(0)
            for service in self.services:
                for _ in range(self._number):
                    self.workers[service].append(self._worker(service))
            self.wait_until_ready(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all processes; safe to call twice."""
        workers = [worker for group in self.workers.values() for worker in group]
        for worker in workers:  # all at once: each takes a moment to drain
            worker.terminate()
        for worker in workers:
            worker.stop()
        self.workers = {service: [] for service in self.services}
        for started in (*self.remotes.values(), self.sink, self.web):
            if started is not None:
                started.stop()
        self.remotes, self.sink, self.web = {}, None, None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def _make_tables(self) -> None:
        for service, url in self.stores.items():
            store = SqlStore(url)
            try:
                await store.prepare(create=True)
                async with store.engine.begin() as connection:
                    await connection.run_sync(tables_of(service).create_all)
            finally:
                await store.close()

    def _worker(self, service: str) -> Worker:
        return Worker(service, self.environment(service), self.directory / f"{service}.log")

    def _start_web(self, port: int) -> Started:
        # It confirms by sending ConfirmEmail through the outbox of authentication's own database.
        return Started(
            "examples.batch_import.authentication.web",
            "--store",
            self.stores["authentication"],
            "--port",
            str(port),
        )

    def environment(self, service: str) -> dict[str, str]:
        """The variables that a worker of `service` is started with."""
        given = {name: text for name, text in os.environ.items() if "SAGACITY_" not in name}
        given |= {
            "SAGACITY_STORE": self.stores[service],
            "SAGACITY_BUS": self.bus,
            "SAGACITY_PREFIX": self.prefix,
            surroundings.SECRET: self._secret,
            surroundings.CONFIRM_URL: self.confirm_url,
            **{
                surroundings.remote_url(system): remote.url
                for system, remote in self.remotes.items()
            },
        }
        if self.sink is not None:
            facts = self.sink.facts
            given[surroundings.SMTP] = f"{facts['smtp_host']}:{facts['smtp_port']}"
        return {**given, **self.settings}

    # ------------------------------------------------------------------------------ the processes

    def wait_until_ready(self, deadline: float = 60.0) -> None:
        """Return when every worker has joined its group; raises StartFailed if one does not."""
        ends = time.monotonic() + deadline
        waiting = [worker for group in self.workers.values() for worker in group]
        while waiting := [worker for worker in waiting if not worker.ready()]:
            if time.monotonic() > ends:
                names = ", ".join(worker.service for worker in waiting)
                raise StartFailed(f"not ready within {deadline:g} seconds: {names}")
            time.sleep(0.02)

    def kill(self, service: str) -> None:
        """End all workers of a service as a crash would; `restart` starts new ones."""
        for worker in self.workers[service]:
            worker.kill()
        self.workers[service] = []

    def stop_workers(self, service: str) -> None:
        """End the workers of a service in good order; `restart` starts new ones."""
        for worker in self.workers[service]:
            worker.stop()
        self.workers[service] = []

    def restart(self, service: str, deadline: float = 60.0) -> None:
        """Start the workers of a service that was killed or stopped, with the present settings."""
        while len(self.workers[service]) < self._number:
            self.workers[service].append(self._worker(service))
        self.wait_until_ready(deadline)

    def kill_sink(self) -> None:
        """End the mail sink as a crash would; its mails stay. `restart_sink` starts it in place."""
        assert self.sink is not None
        self.sink.kill()

    def restart_sink(self) -> None:
        """Start the mail sink again on the same ports."""
        assert self.sink is not None
        facts = self.sink.facts
        self.sink = start_mail_sink(
            self.mail_file, int(facts["smtp_port"]), httpx.URL(self.sink.url).port or 0
        )

    # ---------------------------------------------------------------------------------- addresses

    @property
    def confirm_url(self) -> str:
        """What confirm links begin with; empty without the authentication service."""
        return f"{self.web.url}/confirm" if self.web is not None else ""

    @property
    def mail_url(self) -> str:
        """Where the accepted mails can be read."""
        assert self.sink is not None
        return f"{self.sink.url}/mails"

    @property
    def mail_file(self) -> Path:
        return self.directory / "mails.sqlite"

    def ledger_file(self, system: str) -> Path:
        """The file in which a remote system keeps its accounts and its ledger."""
        return self.directory / f"{system}.sqlite"

    # ---------------------------------------------------------------------- what people do with it

    def load(self, file: Path) -> Receipt:
        """Hand a batch file in, as `python -m examples.batch_import load` does; does not wait."""
        return asyncio.run(
            submit(file, store=self.stores["importing"], bus=self.bus, prefix=self.prefix)
        )

    def wait_until_quiet(self, deadline: float = 30.0) -> None:
        """Return when nothing is under way any more; raises StillMoving."""
        asyncio.run(until_quiet(self.stores, self.bus, self.prefix, deadline))

    def report(self, batch_id: str) -> BatchReport | None:
        """What became of a batch, as far as it has come."""
        return asyncio.run(read_report(self.stores["importing"], batch_id))

    def convergence(self, batch_id: str) -> Convergence | None:
        """Whether all that follows from a batch has ended, and what is open."""
        return asyncio.run(convergence(self.stores, batch_id))

    def link(self, to: str) -> str:
        """The confirm link of the newest mail to an address; raises LookupError without one."""
        mails = self.mails(to)
        if not mails:
            raise LookupError(f"no mail to {to}")
        return link_in(mails[-1]["raw"])

    def visit(self, link: str) -> httpx.Response:
        """Look at the page that a confirm link leads to, as a mail scanner does."""
        return self._http.get(link)

    def follow(self, link: str) -> httpx.Response:
        """Press the button on the page that a confirm link leads to."""
        return self._http.post(link)

    def confirm(self, user_ref: str) -> httpx.Response:
        """Follow the link of the newest mail to the address that a user has now."""
        return self.follow(self.link(self.rows("importing", "user", ref=user_ref)[0]["email"]))

    def rows(self, service: str, table: str, **equal: object) -> list[dict[str, Any]]:
        """Rows of `SERVICE_table` whose columns have these values, in the order of its key."""
        named = table_named(tables_of(service), service, table)
        return asyncio.run(read_rows(self.stores[service], named, equal))

    @property
    def place(self) -> Place:
        """Where everything is, for other command lines."""
        return Place(
            stores=dict(self.stores),
            bus=self.bus,
            prefix=self.prefix,
            ledgers={system: str(self.ledger_file(system)) for system in SYSTEMS},
            mails=str(self.mail_file),
            confirm_url=self.confirm_url,
        )

    def check(self) -> list[Verdict]:
        """All invariants, each with what is wrong."""
        return asyncio.run(check_all(self.place.evidence))

    def held_up(self) -> list[str]:
        """What needs a person: stuck compensations and dead letters."""
        return asyncio.run(held_up(self.place.evidence))

    # ----------------------------------------------------------------------- the simulated systems

    def set_faults(self, name: str, *rules: Mapping[str, Any]) -> None:
        """Replace the fault plan of a remote system, or of `mail-sink`; none lets all go well."""
        started = self._simulated(name)
        answer = self._http.put(f"{started.url}/faults", json=[dict(rule) for rule in rules])
        if answer.is_error:
            raise ValueError(f"{name} refuses the faults: {answer.text}")

    def faults(self, name: str) -> list[dict[str, Any]]:
        """The rules in force with how often each struck (`used`) and strikes now (`waiting`)."""
        return self._rows(f"{self._simulated(name).url}/faults")

    def ledger(self, system: str) -> list[dict[str, Any]]:
        """Every account that a remote system made or deleted, oldest first."""
        return self._rows(f"{self.remotes[system].url}/ledger")

    def calls(self, system: str) -> list[dict[str, Any]]:
        """Every request that a remote system answered or dropped, oldest first."""
        return self._rows(f"{self.remotes[system].url}/calls")

    def live_accounts(self, system: str) -> list[dict[str, Any]]:
        """The accounts that exist in a remote system."""
        return self._rows(f"{self.remotes[system].url}/accounts")

    def mails(self, to: str | None = None) -> list[dict[str, Any]]:
        """The mails that the sink has accepted, oldest first; all, or those to one address."""
        assert self.sink is not None
        query = {"to": to} if to is not None else {}
        return self._rows(str(httpx.URL(f"{self.sink.url}/mails", params=query)))

    def _simulated(self, name: str) -> Started:
        if name == "mail-sink":
            assert self.sink is not None
            return self.sink
        return self.remotes[name]

    def _rows(self, url: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self._http.get(url).raise_for_status().content)
        return rows


def sqlite_stores(directory: Path) -> dict[str, str]:
    """One SQLite file for each service."""
    return {
        service: f"sqlite+aiosqlite:///{(directory / f'{service}.db').absolute()}"
        for service in SERVICES
    }


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
