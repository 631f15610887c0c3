"""Settings of a worker: flag before environment before file before default.

One table of fields is the source of everything: the command line's flags (``--batch-max``), the
environment variables (``SAGACITY_BATCH_MAX``), the reference page, and the checks. Every text that
can be printed shows URLs without their secrets.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, inspect

from sagacity.core.decide import Limits
from sagacity.core.errors import ConfigurationError
from sagacity.core.routing import Retry
from sagacity.ports import Retention
from sagacity.worker.redaction import redacted

__all__ = ["ENVIRONMENT_PREFIX", "Field", "Settings", "fields", "unknown_variables"]

ENVIRONMENT_PREFIX: Final = "SAGACITY_"
_DAY_US: Final = 86_400_000_000
_FROM_FILES: Final = ("store", "bus")
"""Settings that `SAGACITY_<NAME>_FILE` may name a file for: the ones that hold secrets."""
_OTHER_VARIABLES: Final = ("SAGACITY_TEST_", "SAGACITY_INTERNAL_")


def _of(section: str, text: str, **limits: Any) -> Meta:
    return Meta(description=text, extra={"section": section}, **limits)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one worker process runs. Checked on creation; raises ConfigurationError.

    Units are the last part of a name: ``_ms``, ``_s``, ``_days``, ``_bytes_max``.
    """

    # --- servers
    store: Annotated[
        str, _of("Servers", "Database URL: sqlite+aiosqlite, postgresql+asyncpg or +psycopg.")
    ] = "sqlite+aiosqlite:///sagacity.db"
    bus: Annotated[str, _of("Servers", "Message bus URL: redis, rediss or unix.")] = (
        "redis://127.0.0.1:6379/0"
    )
    prefix: Annotated[
        str,
        _of(
            "Servers",
            "First part of every name on the bus; all services that talk to each other share it.",
            min_length=1,
            max_length=64,
            pattern=r"^[A-Za-z0-9_.{}-]+\Z",
            title="1 to 64 letters, digits and . _ - { }",
        ),
    ] = "sagacity"
    consumer: Annotated[
        str,
        _of(
            "Servers",
            "Name of this process in its consumer group; made of host and process id where empty.",
            max_length=191,
            pattern=r"^[A-Za-z0-9_.:@-]*\Z",
            title="up to 191 letters, digits and . _ : @ -",
        ),
    ] = ""

    # --- batches
    batch_max: Annotated[
        int, _of("Batches", "Messages per transaction, at most.", ge=1, le=5000)
    ] = 300
    batches_max: Annotated[
        int,
        _of(
            "Batches",
            "Transactions of batches at the same time, at most: while the database writes one, the"
            " next is decided.",
            ge=1,
            le=64,
        ),
    ] = 2
    batch_wait_ms: Annotated[
        int,
        _of("Batches", "How long a batch waits to fill; 0 takes what is there.", ge=0, le=10_000),
    ] = 0
    batch_deadline_ms: Annotated[
        int, _of("Batches", "How long one transaction may take.", ge=100, le=600_000)
    ] = 10_000
    read_block_ms: Annotated[
        int, _of("Batches", "How long one read waits for messages.", ge=1, le=5000)
    ] = 1000
    in_flight_bytes_max: Annotated[
        int,
        _of("Batches", "Bytes of messages held in memory, at most.", ge=1024, le=2**40),
    ] = 64 * 2**20
    reclaim_idle_ms: Annotated[
        int,
        _of(
            "Batches",
            "A message unacknowledged for this long is taken over from its worker; at least three"
            " times the batch deadline.",
            ge=100,
            le=86_400_000,
        ),
    ] = 30_000
    reclaim_interval_ms: Annotated[
        int, _of("Batches", "How often a worker looks for such messages.", ge=10, le=3_600_000)
    ] = 5000

    # --- limits
    payload_bytes_max: Annotated[
        int, _of("Limits", "Largest body of a message.", ge=64, le=64 * 2**20)
    ] = Limits().payload_bytes_max
    state_bytes_max: Annotated[
        int, _of("Limits", "Largest data of a saga instance.", ge=64, le=256 * 2**20)
    ] = Limits().state_bytes_max
    commands_max: Annotated[
        int, _of("Limits", "Messages one step of a saga may send.", ge=1, le=10**6)
    ] = Limits().commands_max
    timeouts_max: Annotated[
        int, _of("Limits", "Timeouts one saga instance may have set.", ge=1, le=10**6)
    ] = Limits().timeouts_max
    deferred_max: Annotated[
        int, _of("Limits", "Early events one saga instance may keep.", ge=1, le=10**6)
    ] = Limits().deferred_max
    parked_max: Annotated[
        int, _of("Limits", "Messages that may wait behind a failed one.", ge=1, le=10**6)
    ] = Limits().parked_max

    # --- participants
    concurrency: Annotated[
        int, _of("Participants", "Handlers that run at the same time.", ge=1, le=10_000)
    ] = 16
    concurrency_per_handler: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=10_000)]],
        _of(
            "Participants",
            "Limits of single handlers, by function name: 'create_account=4,send_mail=2'.",
        ),
    ] = {}
    lease_s: Annotated[
        float,
        _of(
            "Participants",
            "A handler's message is safe from other workers for this long; renewed while it runs.",
            ge=1,
            le=3600,
        ),
    ] = 30.0
    sequence_gap_s: Annotated[
        float,
        _of(
            "Participants",
            "A command waits this long for an earlier one of its saga that has not arrived.",
            ge=0,
            le=86_400,
        ),
    ] = 60.0

    # --- retries
    attempts_max: Annotated[
        int, _of("Retries", "Attempts before a message is a dead letter.", ge=1, le=1000)
    ] = Retry().attempts_max
    backoff_base_ms: Annotated[
        int,
        _of(
            "Retries",
            "Longest wait before the second attempt; doubles with each attempt, with jitter.",
            ge=1,
            le=3_600_000,
        ),
    ] = Retry().base_us // 1000
    backoff_cap_s: Annotated[
        float, _of("Retries", "Longest wait before any attempt.", ge=0.01, le=86_400)
    ] = Retry().cap_us / 1_000_000
    missing_window_s: Annotated[
        float,
        _of(
            "Retries",
            "A message waits this long for the saga instance it belongs to.",
            ge=0,
            le=30 * 86_400,
        ),
    ] = Retry().missing_us / 1_000_000

    # --- clockwork
    sweep_interval_ms: Annotated[
        int,
        _of("Clockwork", "How often the relay looks for unpublished messages.", ge=10, le=600_000),
    ] = 500
    pending_age_ms: Annotated[
        int,
        _of(
            "Clockwork",
            "The relay publishes what its own worker has not published for this long.",
            ge=1,
            le=600_000,
        ),
    ] = 1000
    timeouts_poll_ms: Annotated[
        int,
        _of("Clockwork", "How often a worker looks for due timeouts, at least.", ge=1, le=60_000),
    ] = 500
    cleaning_interval_s: Annotated[
        float, _of("Clockwork", "How often old rows are deleted.", ge=0.1, le=86_400)
    ] = 60.0

    # --- retention
    inbox_days: Annotated[
        float,
        _of(
            "Retention",
            "Duplicates are recognised for this long; at least as long as the outbox.",
            gt=0,
            le=36_500,
        ),
    ] = 14.0
    outbox_days: Annotated[
        float,
        _of("Retention", "Published messages can be sent again for this long.", gt=0, le=36_500),
    ] = 14.0
    history_days: Annotated[
        float, _of("Retention", "Transitions are kept for this long.", gt=0, le=36_500)
    ] = 90.0
    finished_days: Annotated[
        float,
        _of(
            "Retention",
            "Finished saga instances are kept for this long; at least as long as the inbox.",
            gt=0,
            le=36_500,
        ),
    ] = 30.0
    stream_hours: Annotated[
        float,
        _of(
            "Retention",
            "Messages that every group acknowledged stay on the bus this long: for groups that join"
            " later, and for replay after a database was restored; at most as long as the inbox.",
            gt=0,
            le=876_000,
        ),
    ] = 24.0
    dead_letters_days: Annotated[
        float, _of("Retention", "Dead letters are kept for this long.", gt=0, le=36_500)
    ] = 90.0

    # --- process
    shutdown_timeout_s: Annotated[
        float,
        _of("Process", "How long a stop may take before the process ends anyway.", ge=0.1, le=3600),
    ] = 30.0
    health: Annotated[
        str,
        _of(
            "Process",
            "Where to answer /healthz and /readyz; off where empty, and 127.0.0.1 without a host.",
        ),
    ] = ""
    log_format: Annotated[
        Literal["human", "json"], _of("Process", "How log lines look: human or json.")
    ] = "human"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _of("Process", "Least level logged: debug, info, warning or error."),
    ] = "info"

    def __post_init__(self) -> None:
        for field in fields():
            field.check(getattr(self, field.name), f"Settings.{field.name}")
        self._check_together()

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{field.name}={field.shown(getattr(self, field.name))!r}"
            for field in fields()
            if getattr(self, field.name) != field.default
        )
        return f"Settings({changed})"

    __str__ = __repr__

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [(field.name, field.shown(getattr(self, field.name))) for field in fields()]

    @property
    def retention(self) -> Retention:
        """How long finished things are kept, for the store."""
        return Retention(
            inbox_us=int(self.inbox_days * _DAY_US),
            outbox_us=int(self.outbox_days * _DAY_US),
            history_us=int(self.history_days * _DAY_US),
            finished_us=int(self.finished_days * _DAY_US),
            dead_letters_us=int(self.dead_letters_days * _DAY_US),
        )

    @property
    def retry(self) -> Retry:
        """When failed messages are tried again, for the core."""
        return Retry(
            attempts_max=self.attempts_max,
            base_us=self.backoff_base_ms * 1000,
            cap_us=int(self.backoff_cap_s * 1_000_000),
            missing_us=int(self.missing_window_s * 1_000_000),
        )

    @property
    def limits(self) -> Limits:
        """How large a step and an instance may get, for the core."""
        return Limits(
            commands_max=self.commands_max,
            timeouts_max=self.timeouts_max,
            deferred_max=self.deferred_max,
            parked_max=self.parked_max,
            state_bytes_max=self.state_bytes_max,
            payload_bytes_max=self.payload_bytes_max,
        )

    @property
    def health_address(self) -> tuple[str, int] | None:
        """Host and port to answer health questions on, or None; a lone port means 127.0.0.1."""
        return _address(self.health, "Settings.health") if self.health else None

    @classmethod
    def read(
        cls,
        flags: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Settings:
        """Settings from texts: `flags` (field name -> text), then `environment` (default: ours).

        Of the environment only ``SAGACITY_<NAME>`` is read, and ``SAGACITY_STORE_FILE`` and
        ``SAGACITY_BUS_FILE``, which name files that hold the URLs; an empty variable counts as
        unset. Raises ConfigurationError
        naming the flag or variable at fault, what was expected and what was found.
        """
        flags = flags or {}
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for field in fields():
            if field.name in flags:
                values[field.name] = field.parse(flags[field.name], field.flag)
            elif environment.get(field.variable):
                values[field.name] = field.parse(environment[field.variable], field.variable)
            elif field.name in _FROM_FILES and environment.get(f"{field.variable}_FILE"):
                variable = f"{field.variable}_FILE"
                text = _content(environment[variable], variable)
                values[field.name] = field.parse(text, variable)
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """All variables from which another process reads these settings; holds the secrets."""
        return {field.variable: field.text(getattr(self, field.name)) for field in fields()}

    def _check_together(self) -> None:
        _expect(
            self.reclaim_idle_ms >= 3 * self.batch_deadline_ms,
            "reclaim_idle_ms",
            f"at least three times batch_deadline_ms ({3 * self.batch_deadline_ms})",
            self.reclaim_idle_ms,
            "a batch that still runs must not be taken over; raise one or lower the other",
        )
        _expect(
            self.inbox_days >= self.outbox_days,
            "inbox_days",
            f"at least outbox_days ({self.outbox_days:g})",
            self.inbox_days,
            "a message sent again must still be recognised as a duplicate",
        )
        _expect(
            self.stream_hours <= 24 * self.inbox_days,
            "stream_hours",
            f"at most inbox_days ({24 * self.inbox_days:g} hours)",
            self.stream_hours,
            "a message read again must still be recognised as a duplicate",
        )
        _expect(
            self.finished_days >= self.inbox_days,
            "finished_days",
            f"at least inbox_days ({self.inbox_days:g})",
            self.finished_days,
            "a late message must not start a finished saga again",
        )
        _expect(
            self.in_flight_bytes_max >= self.payload_bytes_max,
            "in_flight_bytes_max",
            f"at least payload_bytes_max ({self.payload_bytes_max})",
            self.in_flight_bytes_max,
            "the largest message must fit",
        )
        _expect(
            self.backoff_cap_s * 1000 >= self.backoff_base_ms,
            "backoff_cap_s",
            f"at least backoff_base_ms ({self.backoff_base_ms / 1000:g} s)",
            self.backoff_cap_s,
            "the cap bounds every wait",
        )


class Field(msgspec.Struct, frozen=True):
    """One setting: its names, what it takes, and how to read and show it."""

    name: str
    section: str
    description: str
    default: Any
    type: Any

    @property
    def limits(self) -> Meta:
        """The least and the greatest it takes, or its pattern."""
        return _meta(self.type)

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def expected(self) -> str:
        """What it takes, in words: ``an integer from 1 to 5000``."""
        kind = get_args(self.type)[0]
        if get_origin(kind) is Literal:
            *others, last = get_args(kind)
            return f"{', '.join(others)} or {last}"
        return _words(inspect.type_info(kind), self.limits)

    @property
    def is_url(self) -> bool:
        """True where the value may hold a secret."""
        return self.name in _FROM_FILES

    def shown(self, value: Any) -> Any:
        """The value as it may be printed."""
        return redacted(value) if self.is_url and isinstance(value, str) else value

    def text(self, value: Any) -> str:
        """The value as `parse` reads it."""
        if isinstance(value, dict):
            pairs = cast("dict[str, int]", value)
            return ",".join(f"{name}={number}" for name, number in pairs.items())
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def parse(self, text: str, where: str) -> Any:
        """The value written as `text`; raises ConfigurationError naming `where`."""
        value: Any = text.strip()
        if isinstance(self.default, dict):
            value = _pairs(value, where)
        value = self._converted(value, where, strict=not isinstance(value, str))
        self.check(value, where)
        return value

    def check(self, value: Any, where: str) -> None:
        """Raises ConfigurationError where `value` is not allowed."""
        self._converted(value, where, strict=True)
        if self.is_url and not value:
            raise _wrong(where, "a URL", value)
        if self.name == "health" and value:
            _address(value, where)

    def _converted(self, value: Any, where: str, *, strict: bool) -> Any:
        try:
            return msgspec.convert(value, self.type, strict=strict)
        except msgspec.ValidationError:
            # The text of msgspec would do, but may quote a URL and does not say what was found.
            raise _wrong(where, self.expected, self.shown(value)) from None


_fields: tuple[Field, ...] = ()


def fields() -> tuple[Field, ...]:
    """All settings, in the order they are declared."""
    global _fields
    if not _fields:
        hints = get_type_hints(Settings, include_extras=True)
        info = inspect.type_info(Settings)
        assert isinstance(info, inspect.StructType)
        _fields = tuple(
            Field(
                name=field.name,
                section=(_meta(hints[field.name]).extra or {})["section"],
                description=str(_meta(hints[field.name]).description),
                default=field.default if field.default is not msgspec.NODEFAULT else {},
                type=hints[field.name],
            )
            for field in info.fields
        )
    return _fields


def unknown_variables(
    environment: Mapping[str, str] | None = None, *, others: Iterable[str] = ()
) -> list[str]:
    """One line per ``SAGACITY_*`` variable that no setting reads, with the nearest known name.

    `others` are variables that something else reads.
    """
    environment = os.environ if environment is None else environment
    known = {field.variable for field in fields()} | set(others)
    known |= {f"{ENVIRONMENT_PREFIX}{name.upper()}_FILE" for name in _FROM_FILES}
    lines: list[str] = []
    for name in sorted(environment):
        ours = name.startswith(ENVIRONMENT_PREFIX) and not name.startswith(_OTHER_VARIABLES)
        if ours and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            lines.append(f"{name} is read by nobody" + (f"; {near[0]}?" if near else ""))
    return lines


def _meta(hint: Any) -> Meta:
    return cast("Meta", hint.__metadata__[-1])


def _words(info: inspect.Type, limits: Meta) -> str:
    """A type and its limits in words, as far as the settings need it."""
    match info:
        case inspect.DictType():
            return "handler=number pairs joined by commas, numbers from 1 to 10000"
        case inspect.IntType() | inspect.FloatType():
            noun = "an integer" if isinstance(info, inspect.IntType) else "a number"
            if limits.gt is not None:
                return f"{noun} greater than {limits.gt:g}, at most {limits.le:g}"
            return f"{noun} from {limits.ge} to {limits.le}"
        case _:
            return limits.title or "a text"


def _pairs(text: str, where: str) -> dict[str, int]:
    pairs: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, number = part.partition("=")
        if not sign or not name.strip() or not number.strip().isdecimal():
            raise _wrong(where, "handler=number pairs joined by commas", part)
        pairs[name.strip()] = int(number)
    return pairs


def _address(text: str, where: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise _wrong(where, "HOST:PORT or PORT, with a port from 0 to 65535", text)
    return host, int(port)


def _content(path: str, where: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise _wrong(where, "the path of a readable text file", f"{reason}: {path}") from None


def _wrong(where: str, expected: str, got: object) -> ConfigurationError:
    shown = repr(got) if len(repr(got)) <= 80 else repr(got)[:77] + "..."
    return ConfigurationError(f"{where}: expected {expected}, got {shown}")


def _expect(holds: bool, name: str, expected: str, got: object, why: str) -> None:
    if not holds:
        field = next(field for field in fields() if field.name == name)
        raise ConfigurationError(
            f"{field.flag} ({field.variable}): expected {expected}, got {got}; {why}"
        )
