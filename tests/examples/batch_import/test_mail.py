"""The opt-in mail, and sending it to a real SMTP server under every fault."""

import asyncio
import re
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email import message_from_bytes, message_from_string
from email.message import EmailMessage
from email.policy import SMTPUTF8
from email.policy import default as modern
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.batch_import.mail import (
    MailRefused,
    MailUnavailable,
    compose,
    confirm_link,
    link_in,
    send,
)
from examples.batch_import.processes import Started, start_mail_sink

HTTP = httpx.Client(verify=False)
URL = "http://127.0.0.1:8000/confirm"
DATE = datetime(2026, 1, 31, 12, tzinfo=UTC)


def mail(
    to: str = "ada@example.test", name: str = "Ada", token: str = "t0ken", number: int = 1
) -> EmailMessage:
    return compose(
        to=to,
        name=name,
        token=token,
        message_id=f"<optin-{number}@example.test>",
        confirm_url=URL,
        sender="shop@example.test",
        date=DATE,
    )


class Sink:
    """A running mail sink, seen from the test."""

    def __init__(self, process: Started) -> None:
        self.process = process
        self.host: str = process.facts["smtp_host"]
        self.port: int = process.facts["smtp_port"]

    async def send(self, message: EmailMessage, timeout: float = 10.0) -> None:
        await send(message, host=self.host, port=self.port, timeout=timeout)

    def mails(self, to: str) -> list[dict[str, Any]]:
        answer = HTTP.get(f"{self.process.url}/mails", params={"to": to}).raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found

    def put_faults(self, *rules: dict[str, Any]) -> None:
        HTTP.put(f"{self.process.url}/faults", json=rules).raise_for_status()

    def faults(self) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = HTTP.get(f"{self.process.url}/faults").json()
        return states


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    with start_mail_sink(tmp_path_factory.mktemp("sink") / "mails.sqlite") as started:
        yield Sink(started)
    HTTP.close()


@pytest.fixture
def sink(process: Sink) -> Iterator[Sink]:
    """The sink without faults; tests keep apart by their addresses."""
    yield process
    process.put_faults()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not await anyio.to_thread.run_sync(condition):  # noqa: ASYNC110 - another process
            await anyio.sleep(0.01)


# --- composing ---------------------------------------------------------------------------------


def test_the_mail_says_who_what_and_where_to_confirm() -> None:
    message = message_from_bytes(mail(name="Zoë Ångström").as_bytes(), policy=modern)
    assert isinstance(message, EmailMessage)
    assert message["To"] == "Zoë Ångström <ada@example.test>"
    assert message["From"] == "shop@example.test"
    assert message["Message-ID"] == "<optin-1@example.test>"
    assert message["Date"].datetime == DATE
    assert "Hello Zoë Ångström," in message.get_content()
    assert link_in(message.as_bytes()) == f"{URL}/t0ken"


def test_equal_arguments_give_equal_bytes() -> None:
    """A mail that has to be sent again must be the same mail."""
    assert mail(name="Zoë").as_bytes() == mail(name="Zoë").as_bytes()
    assert mail().as_bytes() != mail(token="other").as_bytes()


@settings(deadline=None)
@given(st.text(max_size=200), st.text(st.characters(codec="utf-8"), min_size=1, max_size=80))
def test_no_name_breaks_a_header_or_the_link(name: str, token: str) -> None:
    name = name.encode("utf-8", "replace").decode()
    message = message_from_bytes(mail(name=name, token=token).as_bytes(), policy=modern)
    assert [address.addr_spec for address in message["To"].addresses] == ["ada@example.test"]
    assert {name.lower() for name in message} == {
        "to",
        "from",
        "subject",
        "date",
        "message-id",
        "auto-submitted",
        "content-type",
        "content-transfer-encoding",
        "mime-version",
    }
    assert link_in(message.as_bytes()) == confirm_link(URL, token)


def test_a_name_with_a_link_does_not_replace_ours() -> None:
    message = mail(name="http://evil.test/click")
    assert link_in(message.as_bytes()) == f"{URL}/t0ken"


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="@"), min_size=1, max_size=40),
    st.text(st.characters(codec="utf-8", exclude_characters="@"), min_size=1, max_size=40),
)
def test_any_address_the_format_lets_pass_is_addressed_or_refused(local: str, domain: str) -> None:
    address = "".join(local.split()) + "@" + "".join(domain.split())
    with suppress(MailRefused):
        message = mail(to=address)
        sent = message_from_string(message.as_string(policy=SMTPUTF8), policy=SMTPUTF8)
        assert [found.addr_spec for found in sent["To"].addresses] == [address]


@pytest.mark.parametrize(
    "address",
    ["o'neil+shop@mail.example.test", "a.b-c_d@x", "jürgen@bücher.test", "用户@例子.test"],
)
def test_ordinary_addresses_are_addressed(address: str) -> None:
    assert [found.addr_spec for found in mail(to=address)["To"].addresses] == [address]


@pytest.mark.parametrize("address", ["a..b@x", "a@b,c@d", "@b", "a@", "a<b>@c", "a\r\nBcc:c@d"])
def test_an_address_no_mail_can_go_to_is_refused_for_good(address: str) -> None:
    with pytest.raises(MailRefused, match="cannot be put into a header"):
        mail(to=address)


def test_a_mail_without_link_is_none_of_ours() -> None:
    with pytest.raises(ValueError, match="holds no link"):
        link_in(b"Message-ID: <a@b>\r\n\r\nhello\r\n")


# --- sending -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_mail_arrives_once_with_its_link(sink: Sink) -> None:
    await sink.send(mail("arrives@example.test", name="Zoë"))
    (received,) = sink.mails("arrives@example.test")
    assert received["message_id"] == "<optin-1@example.test>"
    assert received["from"] == "shop@example.test"
    assert received["to"] == ["arrives@example.test"]
    assert len(str(received["at_us"])) == 16
    assert link_in(received["raw"]) == f"{URL}/t0ken"


@pytest.mark.asyncio
async def test_addresses_beyond_ascii_arrive(sink: Sink) -> None:
    await sink.send(mail("jürgen@bücher.test", name="Jürgen"))
    (received,) = sink.mails("jürgen@bücher.test")
    assert link_in(received["raw"]) == f"{URL}/t0ken"


@pytest.mark.asyncio
async def test_lines_that_begin_with_a_dot_arrive_whole(sink: Sink) -> None:
    await sink.send(mail("dots@example.test", name="\n.\n..Ada"))
    (received,) = sink.mails("dots@example.test")
    assert "Hello . ..Ada," in received["raw"]


@pytest.mark.parametrize("on", ["rcpt", "data"])
@pytest.mark.asyncio
async def test_a_451_is_worth_another_try(sink: Sink, on: str) -> None:
    to = f"later-{on}@example.test"
    sink.put_faults({"action": "temporary", "on": on, "times": 5, "match": {"to": to}})
    for _ in range(5):
        with pytest.raises(MailUnavailable, match="451"):
            await sink.send(mail(to))
    assert sink.mails(to) == []
    await sink.send(mail(to))
    assert len(sink.mails(to)) == 1


@pytest.mark.parametrize("on", ["rcpt", "data"])
@pytest.mark.asyncio
async def test_a_550_is_final_for_that_address_alone(sink: Sink, on: str) -> None:
    to = f"never-{on}@example.test"
    sink.put_faults({"action": "permanent", "on": on, "match": {"to": to}})
    for _ in range(2):
        with pytest.raises(MailRefused, match="550"):
            await sink.send(mail(to))
    await sink.send(mail(f"but-{on}@example.test"))
    assert sink.mails(to) == []
    assert len(sink.mails(f"but-{on}@example.test")) == 1
    assert sink.faults()[0]["used"] == 2


@pytest.mark.asyncio
async def test_a_lost_reply_leaves_a_mail_and_doubt(sink: Sink) -> None:
    to = "lost@example.test"
    sink.put_faults({"action": "drop-reply", "times": 1, "match": {"to": to}})
    with pytest.raises(MailUnavailable):
        await sink.send(mail(to))
    assert len(sink.mails(to)) == 1
    await sink.send(mail(to))
    first, second = sink.mails(to)
    assert first["message_id"] == second["message_id"]
    assert first["raw"] == second["raw"]


@pytest.mark.asyncio
async def test_a_silent_server_is_given_up(sink: Sink) -> None:
    to = "silent@example.test"
    sink.put_faults({"action": "timeout", "times": 1, "match": {"to": to}})
    with pytest.raises(MailUnavailable, match="Timeout"):
        await sink.send(mail(to), timeout=0.2)
    assert sink.mails(to) == []
    sink.put_faults()  # lets the silent session go
    await sink.send(mail(to))
    assert len(sink.mails(to)) == 1


@pytest.mark.asyncio
async def test_sending_does_not_block_the_loop(sink: Sink) -> None:
    to = "beside@example.test"
    sink.put_faults({"action": "timeout", "times": 1, "match": {"to": to}})
    outcome: list[str] = []

    async def attempt() -> None:
        with pytest.raises(MailUnavailable):
            await sink.send(mail(to))
        outcome.append("let go")

    async with anyio.create_task_group() as group:
        group.start_soon(attempt)
        await until(lambda: sink.faults()[0]["waiting"] == 1)  # the loop runs meanwhile
        assert outcome == []
        await anyio.to_thread.run_sync(sink.put_faults)
    assert outcome == ["let go"]


@pytest.mark.asyncio
async def test_nobody_listening_is_unavailable() -> None:
    with pytest.raises(MailUnavailable, match=r"127\.0\.0\.1:9"):
        await send(mail(), host="127.0.0.1", port=9)  # the discard port


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"": "554 no service here"}, MailUnavailable),
        ({"": "421 too busy"}, MailUnavailable),
        ({"EHLO": "550 go away", "HELO": "550 go away"}, MailUnavailable),
        ({"MAIL": "451 later"}, MailUnavailable),
        ({"MAIL": "553 not from you"}, MailRefused),
        ({"RCPT": "452 mailbox full"}, MailUnavailable),
        ({"RCPT": "551 moved"}, MailRefused),
        ({"DATA": "451 later"}, MailUnavailable),
        ({"DATA": "554 no"}, MailRefused),
        ({".": "452 disk full"}, MailUnavailable),
        ({".": "552 too long"}, MailRefused),
        ({"QUIT": "500 what"}, None),
        ({"QUIT": None}, None),
        ({"RCPT": None}, MailUnavailable),
        ({"RCPT": "gibberish"}, MailUnavailable),
    ],
)
@pytest.mark.asyncio
async def test_what_each_answer_means(
    answers: dict[str, str | None], error: type[Exception] | None
) -> None:
    """A server that speaks by the book except for one answer; None closes the connection."""
    usual = {"": "220 hello", "DATA": "354 go on", "QUIT": "221 bye"}

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        verb = ""
        body = False
        while True:
            answer = (usual | answers).get(verb, "250 fine")
            if answer is None:
                break
            writer.write(answer.encode() + b"\r\n")
            body = verb == "DATA" and answer.startswith("354")
            line = await reader.readuntil(b"\r\n.\r\n" if body else b"\n")
            if not body:
                verb = line.decode().split()[0].upper()[:4]
            else:
                verb = "."
            if verb == "QUIT" and "QUIT" not in answers:
                break

    async with scripted(talk) as port:
        if error is None:
            await send(mail(), host="127.0.0.1", port=port, timeout=5)
        else:
            with pytest.raises(error):
                await send(mail(), host="127.0.0.1", port=port, timeout=5)


@pytest.mark.asyncio
async def test_a_server_without_smtputf8_cannot_carry_every_address() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        while await reader.readline():
            writer.write(b"250 fine\r\n")

    async with scripted(talk) as port:
        with pytest.raises(MailRefused, match="SMTPUTF8"):
            await send(mail("jürgen@bücher.test"), host="127.0.0.1", port=port, timeout=5)


@asynccontextmanager
async def scripted(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncGenerator[int]:
    """Serve `talk` on the yielded port; its sessions have ended when the block has."""
    sessions: set[asyncio.Task[None]] = set()

    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await talk(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sessions.add(asyncio.create_task(session(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        async with asyncio.timeout(10):
            await asyncio.gather(*sessions)


# --- the sink as a process ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_kept_mails_outlive_a_crash_and_the_sink_comes_back_in_place(tmp_path: Path) -> None:
    store = tmp_path / "mails.sqlite"
    first = Sink(start_mail_sink(store))
    await first.send(mail("one@example.test"))
    http_port = httpx.URL(first.process.url).port or 0
    assert first.process.kill() == -signal.SIGKILL
    with pytest.raises(MailUnavailable):
        await first.send(mail("two@example.test"))
    with start_mail_sink(store, first.port, http_port) as process:
        again = Sink(process)
        assert (again.port, again.process.url) == (first.port, first.process.url)
        await again.send(mail("two@example.test"))
        assert len(again.mails("one@example.test")) == 1
        assert len(again.mails("two@example.test")) == 1


def test_the_sink_refuses_a_plan_that_means_nothing(sink: Sink) -> None:
    answer = HTTP.put(f"{sink.process.url}/faults", json=[{"action": "drop-reply", "on": "rcpt"}])
    assert answer.status_code == 400
    assert re.search("cannot strike 'rcpt'", answer.json()["error"])
