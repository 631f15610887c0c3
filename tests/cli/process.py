"""A command as a real process whose output a test can wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0


@contextmanager
def _usual_signals() -> Iterator[None]:
    """A child inherits what is ignored, and whoever runs the tests may ignore SIGHUP (nohup) or SIGINT."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGTERM)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Command:
    """``saga-worker ARGUMENTS``, ended for good when the ``with`` block is left.

    `program` may be ``saga`` instead.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        directory: Path = ROOT,
        program: str = "saga-worker",
    ) -> None:
        start = {
            "saga-worker": ["-m", "sagacity"],
            "saga": ["-c", "from sagacity.cli.operator import main; main()"],
        }[program]
        self._arguments: Sequence[str] = [sys.executable, *start, *arguments]
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SAGACITY_")},
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self._directory = directory
        self._changed = threading.Condition()
        self._output = ""

    def __enter__(self) -> Self:
        with _usual_signals():
            self._process = self._started()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._arguments,
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(DEADLINE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return self._output

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def until(self, text: str, *, times: int = 1) -> str:
        """Waits until `text` was printed so often, and returns the output."""
        return self.until_true(lambda output: output.count(text) >= times, f"{text!r} x{times}")

    def until_true(self, holds: Callable[[str], bool], what: str) -> str:
        end = time.monotonic() + DEADLINE_S
        with self._changed:
            while not holds(self._output):
                left = end - time.monotonic()
                ended = not self._reader.is_alive()
                if left <= 0 or ended:
                    reason = "it ended" if ended else "nothing came"
                    raise AssertionError(f"expected {what}, but {reason}:\n{self._output}")
                self._changed.wait(min(left, 0.2))
            return self._output

    def ended(self, within_s: float = DEADLINE_S) -> int:
        """Waits for the end and returns the exit status."""
        try:
            status = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"expected an end, but it runs on:\n{self.output}") from None
        self._reader.join(DEADLINE_S)
        return status

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._output += line
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Polls until `holds`; for what no signal tells."""
    end = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end, f"expected that {what}"
        time.sleep(0.02)
