"""Everything at once, for people: servers, an import, mails, confirmations, a failure, its undoing."""

import asyncio
import signal
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from examples.batch_import.accounts.sagas import AccountSaga
from examples.batch_import.figures import Figures, figures
from examples.batch_import.generate import Plan, generate
from examples.batch_import.mail import link_in
from examples.batch_import.processes import StartFailed
from examples.batch_import.program import Program
from examples.batch_import.quiet import Rest, StillMoving
from examples.batch_import.remotes import SYSTEMS
from examples.batch_import.servers import Servers
from examples.batch_import.showing import (
    BAD,
    DIM,
    GOOD,
    WAITS,
    console,
    convergence_table,
    plain_table,
    report_table,
    story_table,
    verdict_table,
)
from sagacity import SagacityError
from sagacity.backends.sql import SqlStore
from sagacity.core.diagram import mermaid
from sagacity.core.plan import TransitionRow

BATCH: Final = "demo-1"
FAILURES: Final = (
    StartFailed,
    StillMoving,
    SagacityError,
    DBAPIError,
    OSError,
)
"""What is told in a few lines, with the ends of the logs."""
CONFIRMING: Final = 0.8
"""Share of the users who follow the link."""
_COLOURS: Final = {
    "ready": GOOD,
    "active": GOOD,
    "confirmed": GOOD,
    "failed": BAD,
    "cancelled": BAD,
    "refused": BAD,
    "waiting": WAITS,
    "mailed": WAITS,
}


class Demo:
    """One run; `run` returns the exit code."""

    def __init__(
        self,
        *,
        store: str = "",
        users: int = 60,
        orders: int = 200,
        seed: int = 7,
        keep: Path | None = None,
    ) -> None:
        self._store, self._keep = store, keep
        self._plan = Plan(
            users=users,
            orders=orders,
            seed=seed,
            batch_id=BATCH,
            naming_share=0.6,
            cancelled_share=0.05,
            faults={"bad-email": 1, "shared-address": 1, "total-mismatch": 2, "unknown-user": 1},
        )
        self._out = console()
        self._began = time.monotonic()

    def run(self) -> int:
        """Show it all. Ctrl-C, SIGTERM and failures end every process too."""
        signal.signal(signal.SIGTERM, _interrupt)
        with ExitStack() as stack:
            directory = self._keep or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="batch-import-"))
            )
            directory.mkdir(parents=True, exist_ok=True)
            try:
                return self._run(directory.absolute())
            except KeyboardInterrupt:
                self._out.print(Text("\nInterrupted; every process has ended.", WAITS))
                return 130
            except FAILURES as error:
                self._out.print(Text(f"\nThe demo failed: {error}", BAD))
                self._show_logs(directory)
                return 1

    def _run(self, directory: Path) -> int:
        self._head("1", "Servers", "a private Redis, three services, three remote systems, mail")
        with Servers(directory, store=self._store, keep=self._keep is not None) as servers:
            servers.program.place.write(directory)
            self._show_processes(servers)
            program = servers.program
            self._import(program, directory)
            self._confirm(program)
            self._cancel(program, directory)
            self._outcome(program)
            good = self._check(program)
            self._head("", "Ending", "every process is asked to finish what it has begun")
        taken = time.monotonic() - self._began
        word = Text("All invariants hold.", GOOD) if good else Text("Something is wrong.", BAD)
        self._out.print(word + Text(f" The whole demo took {taken:.1f} s.", DIM))
        return 0 if good else 1

    # ------------------------------------------------------------------------------------ the acts

    def _import(self, program: Program, directory: Path) -> None:
        plan = self._plan
        self._head("2", "Import", f"{plan.users} users and {plan.orders} orders, some of them bad")
        file = directory / "demo.xml"
        generate(file, plan)
        program.set_faults("loyalty", {"action": "unavailable", "on": "create", "times": 3})
        program.set_faults("billing", {"action": "drop-reply", "on": "create", "times": 2})
        program.load(file)
        self._watch(program)
        report = program.report(BATCH)
        assert report is not None
        self._out.print(report_table(report))
        program.load(file)
        program.wait_until_quiet()
        assert program.report(BATCH) == report
        self._say("The same file was handed in once more: nothing changed.")

    def _confirm(self, program: Program) -> None:
        mails = program.mails()
        links = [link_in(mail["raw"]) for mail in mails]
        following = links[: max(1, int(len(links) * CONFIRMING))]
        self._head(
            "3",
            "Confirm",
            f"{len(mails)} users got a mail, {len(following)} of them press the button; "
            "shipping refuses one of them, billing loses two answers, loyalty is down three times",
        )
        program.set_faults(
            "shipping",
            {"action": "refuse", "on": "create", "match": {"user": self._refused(program)}},
        )
        for link in following:
            program.follow(link).raise_for_status()
        self._watch(program)

    def _cancel(self, program: Program, directory: Path) -> None:
        ready = program.rows("importing", "order", accounts_state="ready")
        if not ready:
            return
        order = ready[0]
        self._head(
            "4",
            "Cancel",
            f"a second file cancels order {order['ref']}, whose accounts exist; "
            "what no other order holds is released",
        )
        file = directory / "cancel.xml"
        file.write_text(_cancelling(order), encoding="utf-8")
        program.load(file)
        self._watch(program)

    def _outcome(self, program: Program) -> None:
        self._head("5", "Outcome")
        now = asyncio.run(figures(program.stores))
        self._out.print(_panel(now, program))
        found = program.convergence(BATCH)
        assert found is not None
        self._out.print(convergence_table(found))
        told = self._refused_order(program)
        if told is not None:
            order, history = told
            self._head("6", f"The story of order {order}", "AccountSaga, one line for each step")
            self._out.print(story_table(history))
        self._head("7", "Its diagram", "paste it into any Mermaid viewer")
        self._out.print(Text(mermaid(AccountSaga.__definition__)), soft_wrap=True)

    def _check(self, program: Program) -> bool:
        self._head("8", "Check", "every database, ledger and mail against every invariant")
        verdicts = program.check()
        self._out.print(verdict_table(verdicts))
        held = program.held_up()
        for line in held:
            self._out.print(Text(f"needs a person: {line}", WAITS))
        return all(verdict.holds for verdict in verdicts) and not held

    # -------------------------------------------------------------------------------------- details

    def _refused(self, program: Program) -> str:
        """A user whose address was mailed first, and who has an order that names shipping."""
        mailed: list[str] = [optin["user_ref"] for optin in program.rows("authentication", "optin")]
        first = {mail["to"][0]: place for place, mail in enumerate(program.mails())}
        naming = {
            order["user_ref"]
            for order in program.rows("importing", "order", accounts_state="waiting")
            if "shipping" in order["systems"] and len(order["systems"].split()) == 3
        }
        by_mail = sorted(mailed, key=lambda ref: first.get(f"{ref}@example.test", len(first)))
        return next((ref for ref in by_mail if ref in naming), mailed[0])

    def _refused_order(self, program: Program) -> tuple[str, list[TransitionRow]] | None:
        failed = program.rows("importing", "order", accounts_state="failed")
        if not failed:
            return None
        order = max(failed, key=lambda one: len(one["systems"]))["ref"]

        async def read() -> list[TransitionRow]:
            store = SqlStore(program.stores["accounts"])
            try:
                return await store.history("AccountSaga", order)
            finally:
                await store.close()

        return order, asyncio.run(read())

    def _watch(self, program: Program, seconds: float = 100) -> None:
        """Show live figures until nothing moves any more; raises StillMoving."""
        asyncio.run(self._watching(program, seconds))
        if not self._out.is_terminal:
            self._out.print()  # on a terminal the live display ends its last line itself

    async def _watching(self, program: Program, seconds: float) -> None:
        ends = time.monotonic() + seconds
        rest = Rest(program.stores, program.bus, program.prefix)
        now = await figures(program.stores)
        try:
            with Live(_panel(now, program), console=self._out, refresh_per_second=8) as live:
                while not await rest.reached():
                    if time.monotonic() > ends:
                        raise StillMoving(f"not at rest within {seconds:g} seconds: {rest.seen}")
                    await asyncio.sleep(0.1)
                    live.update(_panel(await figures(program.stores), program))
                live.update(_panel(await figures(program.stores), program), refresh=True)
        finally:
            await rest.close()

    def _show_processes(self, servers: Servers) -> None:
        program = servers.program
        table = plain_table("process", "pid", "where")
        table.add_row("redis", str(servers.redis.pid), servers.redis.url)
        for service, workers in program.workers.items():
            for worker in workers:
                store = program.stores[service].rpartition("/")[2]
                table.add_row(f"saga-worker {service}", str(worker.pid), store)
        for system in SYSTEMS:
            remote = program.remotes[system]
            table.add_row(f"remote system {system}", str(remote.pid), remote.url)
        for name, started in (("mail sink", program.sink), ("confirm page", program.web)):
            assert started is not None
            table.add_row(name, str(started.pid), started.url)
        self._out.print(table)

    def _show_logs(self, directory: Path) -> None:
        for path in sorted(directory.glob("*.log")):
            self._out.print(Text(f"--- {path.name}", DIM))
            self._out.print(Text("\n".join(path.read_text(errors="replace").splitlines()[-10:])))

    def _head(self, number: str, title: str, told: str = "") -> None:
        self._out.print()
        line = Text(f"{number}  {title}".strip(), "bold")
        self._out.print(line + Text(f"  {told}" if told else "", DIM))
        self._out.print()

    def _say(self, text: str) -> None:
        self._out.print()
        self._out.print(Text(text))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _panel(now: Figures, program: Program) -> Group:
    bars = Table.grid(padding=(0, 2))
    for batch, (done, records, state) in now.batches.items():
        bars.add_row(
            Text(f"batch {batch}"),
            ProgressBar(total=records or 1, completed=done if records else 0, width=40),
            Text(f"{done} of {records} records, {state}"),
        )
    table = plain_table("what", "so far")
    table.add_row("opt-in cycles", _counted(now.optins))
    table.add_row("orders that ask for accounts", _counted(now.orders))
    for system in SYSTEMS:
        live = len(program.live_accounts(system))
        holds = _counted(now.holds.get(system, Counter()))
        table.add_row(f"{system}, {live} accounts", holds)
    table.add_row("messages sent", str(now.messages))
    return Group(Panel(Group(bars, table), expand=False))


def _counted(counts: Counter[str]) -> Text:
    text = Text()
    for state, count in sorted(counts.items()):
        text.append("  " if text else "")
        text.append(f"{count} {state}", _COLOURS.get(state, ""))
    return text or Text("-", DIM)


def _cancelling(order: dict[str, Any]) -> str:
    """A file of logistics that tells of nothing but a cancelled order."""
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<batch xmlns="urn:batch-import:1" id="demo-2" source="logistics" created="2026-01-02T00:00:00Z" version="1">
<orders>
<order ref="{order["ref"]}" user="{order["user_ref"]}" updated="2026-01-02T00:00:00Z">
<status>cancelled</status><currency>{order["currency"]}</currency><total>1.00</total>
<lines><line sku="whatever" qty="1" price="1.00"/></lines>
</order>
</orders>
</batch>
"""
