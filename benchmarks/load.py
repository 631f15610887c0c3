"""The load: starts sagas, answers their commands at once, and sees from outside when they are over.

One process, one connection, no client library's objects on the path: of the machine's two cores it
shall take as little as possible from what is measured. Each turn is one write and one read:

    starts and replies as XADD, the group's position, then XREAD of the command streams

A turn that brought nothing is followed by a pause. The read does not block: Redis ends a blocking
read late, by up to 100 ms, and the end of a saga shows by no entry that would end it early.

A saga is over when the event that ended it is acknowledged, which every system does after its commit
(`--over acknowledged`), or when its key is on the stream ``finished`` (`--over announced`).

    python -m benchmarks.load --redis unix:///... --sagas 10000 --concurrency 1000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import hiredis

PREFIX = "bench"
COMMANDS = ("auth", "accounts", "mail")
STEPS = {"happy": 3, "compensate": 6, "hot": 1}
"""Durable steps of one saga; of the hot one, of one of its events."""


class Connection:
    """RESP over one socket: many commands in one write, their replies in one list."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(parts.path)
        else:
            self._socket = socket.create_connection((parts.hostname, parts.port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def __call__(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Sends commands; returns their replies. Raises what the server refuses."""
        self._socket.sendall(b"".join(map(hiredis.pack_command, commands)))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is False:
                data = self._socket.recv(1 << 18)
                if not data:
                    raise ConnectionError("Redis closed the connection")
                self._reader.feed(data)
                continue
            if isinstance(reply, hiredis.ReplyError):
                raise reply
            replies.append(reply)
        return replies

    def close(self) -> None:
        self._socket.close()


class Load:
    """A closed loop with `concurrency` sagas under way, or an open one at `rate` sagas a second."""

    def __init__(
        self,
        redis: str,
        *,
        workload: str,
        sagas: int,
        concurrency: int,
        rate: float,
        payload: int,
        duplicates: float,
        over: str,
        group: str,
        deadline_s: float,
    ) -> None:
        self.redis = Connection(redis)
        self.workload, self.sagas, self.concurrency, self.rate = workload, sagas, concurrency, rate
        self.duplicates, self.over, self.group = duplicates, over, group
        self.deadline_s = deadline_s
        # Short where the latency of single sagas is measured, and a core is free to look often.
        self.pause_s = 0.0002 if concurrency <= 10 and not rate else 0.001
        self.document = b"x" * payload
        self.run = f"{random.getrandbits(40):x}"
        self.topic = "items" if workload == "hot" else "imports"
        # Not "$": it would mean the end at each read, and skip what came between two reads.
        self.last = {name: self._end(name) for name in (*COMMANDS, "finished")}
        self.started: dict[bytes, float] = {}
        self.latencies: list[float] = []
        self.ending: deque[tuple[tuple[int, int], bytes]] = deque()
        """(entry id, key) of the events that end a saga, in the order of the stream."""
        self.order = random.Random(7)  # which entries are doubled is the same each run
        self.commands = self.events = 0

    def _end(self, name: str) -> bytes:
        [newest] = self.redis(("XREVRANGE", f"{PREFIX}:{name}", "+", "-", "COUNT", 1))
        return newest[0][0] if newest else b"0-0"

    # ------------------------------------------------------------------------------------- messages

    def event(self, name: bytes, key: bytes, cause: dict[bytes, bytes], **more: bytes) -> Any:
        """An event, answering a command where there is a cause."""
        message_id = b"%s:%s" % (name, cause.get(b"id", key))
        fields = [b"specversion", b"1.0", b"id", message_id, b"type", b"bench." + name]
        fields += [b"time", b"2026-01-01T00:00:00Z", b"correlationid", key]
        if cause:
            fields += [b"inreplyto", cause[b"id"], b"causationid", cause[b"id"]]
            for copied in (b"sagatype", b"sagakey", b"sagauid"):
                if copied in cause:
                    fields += [copied, cause[copied]]
        body = b'{"import_id":"%s","document":"%s"' % (key, self.document)
        body += b"".join(b',"%s":%s' % (n.encode(), value) for n, value in more.items()) + b"}"
        return ("XADD", f"{PREFIX}:imports", "*", *fields, "data", body)

    def item(self, number: int) -> Any:
        """One event of the hot saga."""
        body = b'{"shelf":"%s","item":%d,"document":"%s"}' % (
            self.run.encode(),
            number,
            self.document,
        )
        message_id = b"item:%s:%d" % (self.run.encode(), number)
        fields = ("specversion", "1.0", "id", message_id, "type", "bench.ItemCounted")
        return ("XADD", f"{PREFIX}:items", "*", *fields, "data", body)

    def answer(self, fields: dict[bytes, bytes]) -> tuple[Any, bool]:
        """The reply to a command, and whether it ends the saga."""
        name = fields[b"type"].removeprefix(b"bench.")
        key = fields[b"correlationid"]
        if name == b"AuthenticateUser":
            return self.event(b"UserAuthenticated", key, fields), False
        if name == b"GenerateAccount":
            ends = self.workload == "happy"
            return self.event(b"AccountGenerated", key, fields), ends
        return self.reply(name, key, fields), name == b"RevokeUser"

    def reply(self, name: bytes, key: bytes, cause: dict[bytes, bytes]) -> Any:
        """The framework's own reply: refused for the last step, done for an undo."""
        facts: dict[str, Any] = {
            "command_id": cause[b"id"].decode(),
            "command_type": cause[b"type"].decode(),
        }
        if name == b"WelcomeUser":
            kind = "sagacity.CommandFailed"
            facts |= {"reason": "mailbox full", "refused": True, "attempts": 1}
        else:
            kind = "sagacity.CommandDone"
        fields = ["specversion", "1.0", "id", b"r:" + cause[b"id"], "type", kind]
        fields += ["correlationid", key, "inreplyto", cause[b"id"]]
        for copied in (b"sagatype", b"sagakey", b"sagauid"):
            fields += [copied, cause[copied]]
        stream = f"{PREFIX}:{cause[b'replyto'].decode()}"
        return ("XADD", stream, "*", *fields, "data", json.dumps(facts))

    # -------------------------------------------------------------------------------------- running

    def __call__(self) -> dict[str, float]:
        """Runs to the end of the last saga; returns figures."""
        numbers = itertools.count()
        began = time.perf_counter()
        replies: list[tuple[Any, bytes, bool]] = []
        while len(self.latencies) < self.sagas:
            now = time.perf_counter()
            if now - began > self.deadline_s:
                raise TimeoutError(
                    f"{len(self.latencies)} of {self.sagas} sagas were over after "
                    f"{self.deadline_s:g} s; expected all"
                )
            out = replies
            out += self._starts(numbers, now, now - began)
            ended = len(self.latencies)
            replies = list(self._turn(out))
            if not replies and len(self.latencies) == ended:
                time.sleep(self.pause_s)
        seconds = time.perf_counter() - began
        return self._figures(seconds)

    def _starts(
        self, numbers: Iterator[int], now: float, elapsed: float
    ) -> Iterator[tuple[Any, bytes, bool]]:
        room = self.concurrency - len(self.started)
        left = self.sagas - len(self.started) - len(self.latencies)
        if self.rate:
            room = int(elapsed * self.rate) - (self.sagas - left)
        for _ in range(min(room, left)):
            number = next(numbers)
            key = f"{self.run}-{number}".encode()
            self.started[key] = now
            if self.workload == "hot":
                yield self.item(number), key, True
            else:
                fails = b"true" if self.workload == "compensate" else b"false"
                yield self.event(b"ImportRequested", key, {}, last_step_fails=fails), key, False

    def _turn(self, out: list[tuple[Any, bytes, bool]]) -> Iterator[tuple[Any, bytes, bool]]:
        commands: list[Any] = []
        ends: list[tuple[int, bytes]] = []
        for command, key, ending in out:
            if ending:
                ends.append((len(commands), key))
            commands.append(command)
            if self.duplicates and self.order.random() < self.duplicates:
                commands.append(command)
        self.events += len(out)
        stream = f"{PREFIX}:{self.topic if self.workload != 'compensate' else 'imports.replies'}"
        if self.over == "acknowledged":
            commands += [("XINFO", "GROUPS", stream), ("XPENDING", stream, self.group)]
        keys = [f"{PREFIX}:{name}" for name in self.last]
        commands.append(("XREAD", "COUNT", 1000, "STREAMS", *keys, *self.last.values()))
        results = self.redis(*commands)
        now = time.perf_counter()
        for place, key in ends:
            self.ending.append((_numbers(results[place]), key))
        if self.over == "acknowledged":
            self._acknowledged(results[-3], results[-2], now)
        for name, entries in results[-1] or ():
            topic = name.decode().partition(":")[2]
            self.last[topic] = entries[-1][0]
            for _, flat in entries:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                if topic == "finished":
                    self._over(fields[b"key"], now)
                    continue
                self.commands += 1
                command, ending = self.answer(fields)
                yield command, fields[b"correlationid"], ending

    def _acknowledged(self, groups: Any, pending: Any, now: float) -> None:
        """Everything that the group was given, up to its first pending entry, is over."""
        for group in groups:
            facts = dict(zip(group[::2], group[1::2], strict=True))
            if facts[b"name"].decode() == self.group:
                given = _numbers(facts[b"last-delivered-id"])
                first = _numbers(pending[1]) if pending[0] else (1 << 63, 0)
                while self.ending and self.ending[0][0] <= given and self.ending[0][0] < first:
                    self._over(self.ending.popleft()[1], now)

    def _over(self, key: bytes, now: float) -> None:
        began = self.started.pop(key, None)
        if began is not None:
            self.latencies.append(now - began)

    def _figures(self, seconds: float) -> dict[str, float]:
        ordered = sorted(self.latencies)
        rate = len(ordered) / seconds
        return {
            "sagas": len(ordered),
            "seconds": round(seconds, 4),
            "sagas_per_s": round(rate, 2),
            "steps_per_s": round(rate * STEPS[self.workload], 2),
            "p50_ms": round(ordered[len(ordered) // 2] * 1000, 3),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1000, 3),
            "events": self.events,
            "commands": self.commands,
        }


def _numbers(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number or 0)


def main() -> None:
    """Prints the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--redis", required=True)
    parser.add_argument("--workload", choices=sorted(STEPS), default="happy")
    parser.add_argument("--sagas", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.0, help="sagas a second; 0: closed loop")
    parser.add_argument("--payload", type=int, default=200, help="bytes of each message's document")
    parser.add_argument("--duplicates", type=float, default=0.0, help="share sent twice")
    parser.add_argument("--over", choices=("acknowledged", "announced"), default="acknowledged")
    parser.add_argument("--group", default="imports")
    parser.add_argument("--deadline-s", type=float, default=300.0)
    print(json.dumps(Load(**vars(parser.parse_args()))()))


if __name__ == "__main__":
    main()
