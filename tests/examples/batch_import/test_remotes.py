"""The three remote systems as real processes, and their clients against every fault."""

import gc
import json
import signal
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from examples.batch_import.accounts_api import (
    AccountsApi,
    LoyaltyApi,
    PermanentRefusal,
    ShippingApi,
    Unavailable,
    accounts_api,
)
from examples.batch_import.faults import FaultPlan, Rule
from examples.batch_import.processes import Started, StartFailed, start_remote
from examples.batch_import.remotes import SYSTEMS

every_system = pytest.mark.parametrize("system", SYSTEMS)

HTTP = httpx.Client(verify=False)  # one for all: making one reads the certificate store
TIMEOUT = 10.0
SHORT = 0.3
"""Seconds after which a client gives up where a test makes the remote silent."""


class Running:
    """A remote system in its own process, seen from the test."""

    def __init__(self, system: str, process: Started, ledger: Path) -> None:
        self.system = system
        self.process = process
        self.ledger_file = ledger
        self.port = httpx.URL(process.url).port or 0

    def put_faults(self, *rules: dict[str, Any]) -> None:
        HTTP.put(f"{self.process.url}/faults", json=rules).raise_for_status()

    def faults(self) -> list[dict[str, Any]]:
        return self._get("faults")

    def ledger(self) -> list[tuple[str, str]]:
        return [(row["operation"], row["external_ref"]) for row in self._get("ledger")]

    def calls(self) -> list[tuple[str, int | None, str | None]]:
        return [(row["operation"], row["status"], row["fault"]) for row in self._get("calls")]

    def live(self) -> list[str]:
        return [account["external_ref"] for account in self._get("accounts")]

    def _get(self, path: str) -> list[dict[str, Any]]:
        answer = HTTP.get(f"{self.process.url}/{path}").raise_for_status()
        rows: list[dict[str, Any]] = answer.json()
        return rows

    @asynccontextmanager
    async def api(self, timeout: float = TIMEOUT) -> AsyncGenerator[AccountsApi]:
        async with httpx.AsyncClient(verify=False, timeout=timeout) as client:
            yield accounts_api(self.system, client, self.process.url)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Running]]:
    """One process per system for the module; tests keep apart by their users."""
    running: dict[str, Running] = {}

    def get(system: str) -> Running:
        if system not in running:
            ledger = tmp_path_factory.mktemp(system) / "ledger.sqlite"
            running[system] = Running(system, start_remote(system, ledger), ledger)
        return running[system]

    yield get
    for remote in running.values():
        remote.process.stop()
    HTTP.close()


@pytest.fixture
def remote(system: str, processes: Callable[[str], Running], tmp_path: Path) -> Iterator[Running]:
    """A remote without faults whose rows a test sees as if it were alone."""
    running = processes(system)
    with alone(running) as seen:
        yield seen
    running.put_faults()


@contextmanager
def alone(running: Running) -> Generator[Running]:
    before = {"ledger": len(running.ledger()), "calls": len(running.calls())}

    class Alone(Running):
        def _get(self, path: str) -> list[dict[str, Any]]:
            rows = super()._get(path)
            return rows[before.get(path, 0) :]

    yield Alone(running.system, running.process, running.ledger_file)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not await anyio.to_thread.run_sync(condition):  # noqa: ASYNC110 - another process
            await anyio.sleep(0.01)


# --- the plain way -----------------------------------------------------------------------------


@every_system
@pytest.mark.asyncio
async def test_create_find_delete(remote: Running, request: pytest.FixtureRequest) -> None:
    user = request.node.name
    async with remote.api() as api:
        assert await api.find(user) is None
        remote_id = await api.create(user, "plus", "c-1" + user)
        assert await api.find(user) == remote_id
        assert user in remote.live()
        await api.delete(user, remote_id)
        assert await api.find(user) is None
        assert user not in remote.live()
        await api.delete(user, remote_id)  # gone is gone
    assert remote.ledger() == [("create", user), ("delete", user)]


@every_system
@pytest.mark.asyncio
async def test_the_same_create_again_is_one_account(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    async with remote.api() as api:
        ids = {await api.create(user, None, "c-2" + user) for _ in range(3)}
    assert len(ids) == 1
    assert remote.ledger() == [("create", user)]


@every_system
@pytest.mark.asyncio
async def test_attempts_at_the_same_time_are_one_account(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    ids: set[str] = set()
    async with remote.api() as api, anyio.create_task_group() as group:

        async def attempt() -> None:
            ids.add(await api.create(user, "basic", "c-3" + user))

        for _ in range(5):
            group.start_soon(attempt)
    assert len(ids) == 1
    assert remote.ledger() == [("create", user)]


@every_system
@pytest.mark.asyncio
async def test_an_account_can_be_made_again_after_its_release(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    async with remote.api() as api:
        await api.delete(user, await api.create(user, None, "c-4" + user))
        remote_id = await api.create(user, None, "c-5" + user)
        assert await api.find(user) == remote_id
    assert remote.ledger() == [("create", user), ("delete", user), ("create", user)]


@every_system
@pytest.mark.asyncio
async def test_refs_of_any_letters_are_safe_in_a_url(remote: Running) -> None:
    user = f"ü/?#&= %2F..{remote.system}"
    async with remote.api() as api:
        remote_id = await api.create(user, "a&b", "c-6" + remote.system)
        assert await api.find(user) == remote_id
        await api.delete(user, None)
    assert remote.ledger() == [("create", user), ("delete", user)]


@every_system
def test_the_ledger_counts_microseconds_and_only_grows(remote: Running) -> None:
    wanted = {"external_ref": "clock", "plan": None}
    path = "/accounts/clock" if remote.system == "shipping" else "/accounts"
    method = "PUT" if remote.system == "shipping" else "POST"
    assert created(remote, method, path, wanted, **{"Idempotency-Key": "clock"}) == 201
    rows = HTTP.get(f"{remote.process.url}/ledger").json()
    times = [row["at_us"] for row in rows]
    assert time.time_ns() // 1000 - times[-1] < 60_000_000
    assert times == sorted(times)
    with closing(sqlite3.connect(remote.ledger_file)) as ledger:
        for statement in ("DELETE FROM ledger", "UPDATE ledger SET at_us = 0"):
            with pytest.raises(sqlite3.IntegrityError, match="the ledger only grows"):
                ledger.execute(statement)


# --- what makes the three different ------------------------------------------------------------


def created(remote: Running, method: str, path: str, body: object, **headers: str) -> int:
    return HTTP.request(
        method, f"{remote.process.url}{path}", json=body, headers=headers
    ).status_code


@pytest.mark.parametrize("system", ["billing"])
def test_billing_goes_by_the_key(remote: Running) -> None:
    body = {"external_ref": "key-user", "plan": "plus"}
    assert created(remote, "POST", "/accounts", body) == 400
    key = {"Idempotency-Key": "k-1"}
    assert created(remote, "POST", "/accounts", body, **key) == 201
    assert created(remote, "POST", "/accounts", body, **key) == 200
    assert created(remote, "POST", "/accounts", body | {"plan": "basic"}, **key) == 409
    assert created(remote, "POST", "/accounts", body, **{"Idempotency-Key": "k-2"}) == 201
    assert remote.ledger() == [("create", "key-user")] * 2  # another key is another account


@pytest.mark.parametrize("system", ["billing"])
@pytest.mark.asyncio
async def test_billing_refuses_a_late_repetition_of_a_released_create(remote: Running) -> None:
    async with remote.api() as api:
        await api.delete("late", await api.create("late", None, "k-3"))
        with pytest.raises(PermanentRefusal, match=r"409.*gone"):
            await api.create("late", None, "k-3")
    assert remote.ledger() == [("create", "late"), ("delete", "late")]


@pytest.mark.parametrize("system", ["shipping"])
def test_shipping_goes_by_the_id(remote: Running) -> None:
    body = {"external_ref": "put-user", "plan": "plus"}
    path = f"/accounts/{ShippingApi.account_id('put-user')}"
    assert created(remote, "PUT", path, body) == 201
    assert created(remote, "PUT", path, body) == 200
    assert created(remote, "PUT", path, body | {"plan": "basic"}) == 409
    assert created(remote, "POST", "/accounts", body) == 405
    assert remote.ledger() == [("create", "put-user")]


@pytest.mark.parametrize("system", ["loyalty"])
@pytest.mark.asyncio
async def test_loyalty_opens_what_it_is_told_so_the_client_looks_first(remote: Running) -> None:
    body = {"external_ref": "twice", "plan": None}
    assert created(remote, "POST", "/accounts", body) == 201
    assert created(remote, "POST", "/accounts", body) == 201
    assert remote.ledger() == [("create", "twice")] * 2
    async with remote.api() as api:
        assert await api.create("twice", None, "any") == await api.find("twice")
        await api.delete("twice", None)  # whatever the user has there
        assert await api.find("twice") is None
    assert remote.ledger() == [("create", "twice")] * 2 + [("delete", "twice")] * 2


@pytest.mark.asyncio
async def test_loyalty_keeps_no_locks_behind() -> None:
    async with httpx.AsyncClient(verify=False) as client:
        api = LoyaltyApi(client, "http://127.0.0.1:9")  # nobody listens on the discard port
        for number in range(3):
            with pytest.raises(Unavailable):
                await api.create(f"u-{number}", None, "c")
        gc.collect()  # the caught errors hold their frames
        assert len(api._locks) == 0


@every_system
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"plan": "x"}', b'{"external_ref": 1}'])
def test_a_body_that_is_no_order_is_refused(remote: Running, body: bytes) -> None:
    method, path = ("PUT", "/accounts/x") if remote.system == "shipping" else ("POST", "/accounts")
    answer = HTTP.request(
        method, remote.process.url + path, content=body, headers={"Idempotency-Key": "k"}
    )
    assert answer.status_code == 400
    assert remote.ledger() == []


# --- faults ------------------------------------------------------------------------------------


@every_system
@pytest.mark.parametrize(
    ("action", "error", "status"),
    [
        ("refuse", PermanentRefusal, 422),
        ("conflict", PermanentRefusal, 409),
        ("unavailable", Unavailable, 503),
        ("rate-limit", Unavailable, 429),
    ],
)
@pytest.mark.parametrize("on", ["create", "delete"])
@pytest.mark.asyncio
async def test_an_injected_answer_comes_as_often_as_told(
    remote: Running,
    action: str,
    error: type[PermanentRefusal | Unavailable],
    status: int,
    on: str,
    request: pytest.FixtureRequest,
) -> None:
    user = request.node.name
    rule = {"action": action, "on": on, "times": 2, "match": {"user": user}}
    remote.put_faults(rule)
    async with remote.api() as api:
        remote_id = await api.create(user + "-other", None, "o" + user)  # not matched
        if on == "delete":
            remote_id = await api.create(user, None, "d" + user)
        for _ in range(2):
            with pytest.raises(error, match=str(status)):
                if on == "create":
                    await api.create(user, None, "c" + user)
                else:
                    await api.delete(user, remote_id)
        if on == "create":
            remote_id = await api.create(user, None, "c" + user)
        else:
            await api.delete(user, remote_id)
    assert remote.ledger().count((on, user)) == 1
    (state,) = remote.faults()
    assert (state["used"], state["rule"]["action"]) == (2, action)
    assert [(o, s) for o, s, fault in remote.calls() if fault == action] == [(on, status)] * 2


@every_system
@pytest.mark.asyncio
async def test_a_lost_reply_still_makes_one_account(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    remote.put_faults({"action": "drop-reply", "on": "create", "times": 1})
    async with remote.api() as api:
        with pytest.raises(Unavailable, match="RemoteProtocolError"):
            await api.create(user, "plus", "c" + user)
        assert remote.ledger() == [("create", user)]  # it was carried out
        assert await api.create(user, "plus", "c" + user) == await api.find(user)
    assert remote.ledger() == [("create", user)]


@every_system
@pytest.mark.asyncio
async def test_a_lost_reply_to_a_release_is_harmless(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    remote.put_faults({"action": "drop-reply", "on": "delete", "times": 1})
    async with remote.api() as api:
        remote_id = await api.create(user, None, "c" + user)
        with pytest.raises(Unavailable):
            await api.delete(user, remote_id)
        await api.delete(user, remote_id)
    assert remote.ledger() == [("create", user), ("delete", user)]


@every_system
@pytest.mark.asyncio
async def test_a_create_of_unknown_outcome_can_be_released_without_its_id(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    remote.put_faults({"action": "drop-reply", "on": "create", "times": 1})
    async with remote.api() as api:
        with pytest.raises(Unavailable):
            await api.create(user, None, "c" + user)
        await api.delete(user, None)
        assert await api.find(user) is None
    assert remote.ledger() == [("create", user), ("delete", user)]


@every_system
@pytest.mark.asyncio
async def test_silence_ends_with_the_clients_patience_and_does_nothing(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    remote.put_faults({"action": "timeout", "on": "create", "times": 1})
    async with remote.api(timeout=SHORT) as api:
        with pytest.raises(Unavailable, match="ReadTimeout"):
            await api.create(user, None, "c" + user)
    await until(lambda: remote.faults()[0]["waiting"] == 0)  # the remote noticed
    assert remote.ledger() == []


@every_system
@pytest.mark.asyncio
async def test_silence_is_bounded_for_a_patient_client(remote: Running) -> None:
    remote.put_faults({"action": "timeout", "on": "find", "times": 1, "seconds": 0.05})
    async with remote.api() as api:
        with pytest.raises(Unavailable, match="RemoteProtocolError"):
            await api.find("anyone")


@every_system
@pytest.mark.asyncio
async def test_a_held_answer_comes_when_the_plan_is_replaced(
    remote: Running, request: pytest.FixtureRequest
) -> None:
    user = request.node.name
    remote.put_faults({"action": "hold", "on": "create"})
    ids: list[str] = []
    async with remote.api() as api, anyio.create_task_group() as group:

        async def attempt() -> None:
            ids.append(await api.create(user, None, "c" + user))

        group.start_soon(attempt)
        await until(lambda: remote.faults()[0]["waiting"] == 1)
        assert remote.ledger() == [("create", user)]  # done, though nobody was told
        assert ids == []
        await anyio.to_thread.run_sync(remote.put_faults)
    assert ids == [the_account_of(remote, user)]


def the_account_of(remote: Running, user: str) -> str:
    found = HTTP.get(f"{remote.process.url}/accounts", params={"external_ref": user}).json()
    remote_id: str = found[0]["id"]
    return remote_id


@pytest.mark.parametrize("system", ["loyalty"])
@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([{"action": "explode"}], "no action is called 'explode'"),
        ([{"action": "refuse", "on": "find"}], "'refuse' cannot strike 'find'"),
        ([{"action": "refuse", "whom": "all"}], "whom"),
        ({"action": "refuse"}, "array"),
    ],
)
def test_a_plan_that_means_nothing_is_refused_whole(
    remote: Running, rules: object, reason: str
) -> None:
    remote.put_faults({"action": "conflict"})
    answer = HTTP.put(f"{remote.process.url}/faults", json=rules)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert [state["rule"]["action"] for state in remote.faults()] == ["conflict"]


def test_the_first_rule_that_fits_and_is_not_used_up_strikes() -> None:
    plan = FaultPlan({"a": frozenset({"create"}), "b": frozenset({"create", "find"})})
    plan.replace(
        [
            Rule(action="a", times=1),
            Rule(action="b", match={"user": "u"}, times=1),
            Rule(action="b", on="find"),
        ]
    )
    taken = [
        state.rule if (state := plan.take(on, {"user": user})) else None
        for on, user in [("create", "x"), ("create", "x"), ("create", "u"), ("find", "y")]
    ]
    assert [rule.action if rule else None for rule in taken] == ["a", None, "b", "b"]


# --- as processes ------------------------------------------------------------------------------


@every_system
@pytest.mark.asyncio
async def test_the_ledger_outlives_a_crash(system: str, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    first = Running(system, start_remote(system, ledger), ledger)
    async with first.api() as api:
        await api.create("u-1", "plus", "c-1")
        first.put_faults({"action": "drop-reply", "on": "create", "times": 1})
        with pytest.raises(Unavailable):
            await api.create("u-2", "plus", "c-2")
        assert first.process.kill() == -signal.SIGKILL
        with pytest.raises(Unavailable, match="ConnectError"):
            await api.create("u-1", "plus", "c-1")
    with start_remote(system, ledger, first.port) as process:
        again = Running(system, process, ledger)
        assert again.process.url == first.process.url
        assert again.faults() == []
        async with again.api() as api:
            for user in ("u-1", "u-2"):
                await api.create(user, "plus", f"c-{user[-1]}")
        assert again.ledger() == [("create", "u-1"), ("create", "u-2")]


def test_a_process_ends_quietly_and_in_good_order(tmp_path: Path) -> None:
    process = start_remote("billing", tmp_path / "ledger.sqlite")
    assert process.facts["name"] == "billing"
    assert process.facts["pid"] == process.pid
    assert process.stop() in {0, -signal.SIGTERM}


def test_a_process_ends_with_its_starter(tmp_path: Path) -> None:
    process = start_remote("billing", tmp_path / "ledger.sqlite")
    pipe = process._process.stdin
    assert pipe is not None
    pipe.close()  # what the kernel does to it when the starter dies
    process._process.wait(10)
    process.kill()


def test_a_start_that_fails_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartFailed, match="ended with"):
        start_remote("fax", tmp_path / "ledger.sqlite")
    assert "fax" in capfd.readouterr().err


def test_a_nonsense_answer_is_no_answer() -> None:
    """A proxy's page with status 200 must not pass for an account."""

    def page(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="<html>welcome</html>")

    async def create() -> None:
        async with httpx.AsyncClient(verify=False, transport=httpx.MockTransport(page)) as client:
            with pytest.raises(Unavailable, match="nonsense"):
                await accounts_api("billing", client, "http://remote").create("u", None, "c")

    anyio.run(create)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (301, Unavailable),
        (400, PermanentRefusal),
        (401, PermanentRefusal),
        (404, PermanentRefusal),
        (408, Unavailable),
        (425, Unavailable),
        (429, Unavailable),
        (500, Unavailable),
        (502, Unavailable),
        (504, Unavailable),
    ],
)
def test_every_status_is_one_of_the_two(
    status: int, error: type[PermanentRefusal | Unavailable]
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=json.dumps({"error": "because"}))

    async def create() -> None:
        async with httpx.AsyncClient(verify=False, transport=httpx.MockTransport(answer)) as client:
            with pytest.raises(error, match=f"{status}: because") as caught:
                await accounts_api("billing", client, "http://remote").create("u", None, "c")
            assert str(caught.value).startswith("POST http://remote/accounts answered")

    anyio.run(create)
