"""Start the simulated remote systems as OS processes, know where they listen, and end them."""

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

ROOT: Final = Path(__file__).resolve().parents[2]
"""Where `python -m examples...` works."""


class StartFailed(Exception):
    """The process ended, or said nothing in time, instead of announcing where it listens."""


class Started:
    """A running `python -m MODULE ARGUMENTS`, which ends with this process in any case.

    `facts` is the JSON line it announced itself with. Raises `StartFailed` if none comes within
    `deadline` seconds.
    """

    def __init__(self, module: str, *arguments: str, deadline: float = 30.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--until-stdin-closes"],
            cwd=ROOT,
            stdin=subprocess.PIPE,  # never written: its closing is the end
            stdout=subprocess.PIPE,
        )
        try:
            self.facts: dict[str, Any] = json.loads(self._first_line(deadline))
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Where its HTTP port is."""
        return str(self.facts["url"])

    def stop(self, deadline: float = 10.0) -> int:
        """End it in good order, by force after `deadline` seconds; return its exit code."""
        self._process.terminate()
        try:
            self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._reaped()

    def kill(self) -> int:
        """End it as a crash would (SIGKILL); return its exit code."""
        self._process.kill()
        return self._reaped()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _reaped(self) -> int:
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return code

    def _first_line(self, deadline: float) -> bytes:
        pipe = self._process.stdout
        assert pipe is not None
        line = b""
        ends = time.monotonic() + deadline
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(ends - time.monotonic()):
                    raise StartFailed(f"no announcement within {deadline} seconds")
                received = os.read(pipe.fileno(), 4096)
                if not received:
                    raise StartFailed(f"the process ended with {self._process.wait()}")
                line += received
        return line


def start_remote(name: str, ledger: str | Path, port: int = 0) -> Started:
    """Start the remote system `name` on its ledger; give the port again to restart it in place."""
    module = "examples.batch_import.remotes"
    return Started(module, name, "--ledger", str(ledger), "--port", str(port))


def start_mail_sink(store: str | Path, smtp_port: int = 0, http_port: int = 0) -> Started:
    """Start the mail sink on its store; give the ports again to restart it in place."""
    module = "examples.batch_import.mail_sink"
    ports = ("--smtp-port", str(smtp_port), "--http-port", str(http_port))
    return Started(module, "--store", str(store), *ports)
