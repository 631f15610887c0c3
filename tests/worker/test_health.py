from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from sagacity.core.errors import ConfigurationError
from sagacity.worker import health
from sagacity.worker.health import HealthServer, WorkerProbe

pytestmark = pytest.mark.asyncio


class Figures:
    """A worker as far as a probe sees it."""

    ready = True
    figures: dict[str, object]

    def __init__(self) -> None:
        self.figures = {"in_flight": 2, "idle_s": 0.0}

    def report(self) -> dict[str, object]:
        return self.figures


async def get(server: HealthServer, path: str, method: str = "GET") -> httpx.Response:
    host, port = server.address
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        return await client.request(method, path)


async def raw(server: HealthServer, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(request)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_ready_worker_answers_200_with_its_figures() -> None:
    async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
        assert server.address[0] == "127.0.0.1"
        answer = await get(server, "/readyz")
        assert answer.status_code == 200
        assert answer.json() == {"status": "ok", "in_flight": 2, "idle_s": 0.0}
        assert (await get(server, "/healthz?verbose=1")).status_code == 200


async def test_a_worker_that_is_not_ready_is_alive_all_the_same() -> None:
    worker = Figures()
    worker.ready = False
    async with HealthServer("127.0.0.1", 0, WorkerProbe(worker)) as server:
        answer = await get(server, "/readyz")
        assert answer.status_code == 503
        assert answer.json()["status"] == "unavailable"
        assert (await get(server, "/healthz")).status_code == 200


async def test_a_worker_whose_loop_stands_still_is_not_alive() -> None:
    worker = Figures()
    worker.figures["idle_s"] = health.STALLED_SECONDS + 1
    async with HealthServer("127.0.0.1", 0, WorkerProbe(worker)) as server:
        assert (await get(server, "/healthz")).status_code == 503
        worker.ready = False  # it waits for its servers, and starting it anew would not help
        assert (await get(server, "/healthz")).status_code == 200


async def test_a_question_that_fails_is_no_answer_of_health() -> None:
    class Broken(Figures):
        def report(self) -> dict[str, object]:
            raise RuntimeError("hunter2")

    async with HealthServer("127.0.0.1", 0, WorkerProbe(Broken())) as server:
        answer = await get(server, "/readyz")
        assert answer.status_code == 503
        assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/readyz", 405), ("HEAD", "/readyz", 200)],
)
async def test_only_two_questions_can_be_read(method: str, path: str, status: int) -> None:
    async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
        assert (await get(server, path, method)).status_code == status


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /readyz HTTP/1.1\r\nX: " + b"y" * health.HEAD_BYTES_MAX + b"\r\n\r\n", b"431"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /readyz HTTP/1.1\r\n", b"400"),
        (b"\x00\xff\r\n\r\n", b"400"),
    ],
)
async def test_what_is_no_request_is_refused(request_: bytes, status: bytes) -> None:
    async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
        assert (await raw(server, request_)).split(b" ")[1] == status


async def test_a_slow_client_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "REQUEST_SECONDS", 0.02)
    async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(b"GET /re")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_many_silent_clients_do_not_pile_up() -> None:
    async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
        silent = [
            await asyncio.open_connection(*server.address) for _ in range(health.CONNECTIONS_MAX)
        ]
        reader, writer = await asyncio.open_connection(*server.address)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        for _, open_writer in silent:
            open_writer.close()


async def test_stopping_does_not_wait_for_a_silent_client() -> None:
    async with asyncio.timeout(3):
        async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
            _, writer = await asyncio.open_connection(*server.address)
            writer.write(b"GET ")
            await writer.drain()
        writer.close()


async def test_a_taken_port_is_a_configuration_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: Any = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with HealthServer("127.0.0.1", port, WorkerProbe(Figures())):
                pass


async def test_answers_are_json_that_no_cache_keeps() -> None:
    async with HealthServer("127.0.0.1", 0, WorkerProbe(Figures())) as server:
        answer = await get(server, "/readyz")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert json.loads(answer.content)
