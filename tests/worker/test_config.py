from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sagacity.core.decide import Limits
from sagacity.core.errors import ConfigurationError
from sagacity.core.routing import Retry
from sagacity.worker.config import Settings, fields, unknown_variables

DAY_US = 86_400_000_000


def test_defaults_are_valid_and_read_from_nothing() -> None:
    assert Settings.read({}, {}) == Settings()
    assert Settings().batch_max == 300
    assert Settings().payload_bytes_max == 256 * 1024


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"SAGACITY_BATCH_MAX": "7", "SAGACITY_LEASE_S": "9.5"}
    settings = Settings.read({"batch_max": "8"}, environment)
    assert (settings.batch_max, settings.lease_s, settings.read_block_ms) == (8, 9.5, 1000)


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.read({}, {"SAGACITY_BATCH_MAX": "", "SAGACITY_STORE": ""}) == Settings()


def test_a_url_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "store"
    secret.write_text("postgresql+asyncpg://u:pw@h/d\n")
    environment = {"SAGACITY_STORE_FILE": str(secret)}
    assert Settings.read({}, environment).store == "postgresql+asyncpg://u:pw@h/d"
    both = {**environment, "SAGACITY_STORE": "memory:"}
    assert Settings.read({}, both).store == "memory:"


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings.read({}, {"SAGACITY_BUS_FILE": str(tmp_path / "absent")})
    assert "SAGACITY_BUS_FILE: expected the path of a readable text file" in str(raised.value)
    assert "No such file" in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"batch_max": "x"}, "--batch-max: expected an integer from 1 to 5000, got 'x'"),
        ({"batch_max": "0"}, "--batch-max: expected an integer from 1 to 5000, got '0'"),
        ({"batch_max": "2.5"}, "--batch-max: expected an integer from 1 to 5000, got '2.5'"),
        ({"lease_s": "nan"}, "--lease-s: expected a number from 1 to 3600, got 'nan'"),
        ({"inbox_days": "0"}, "--inbox-days: expected a number greater than 0, at most 36500"),
        ({"log_format": "xml"}, "--log-format: expected human or json, got 'xml'"),
        ({"log_level": "loud"}, "--log-level: expected debug, info, warning or error, got 'loud'"),
        ({"store": " "}, "--store: expected a URL, got ''"),
        ({"prefix": "a b"}, "--prefix: expected 1 to 64 letters, digits and"),
        ({"health": "localhost"}, "--health: expected HOST:PORT or PORT"),
        ({"health": "1.2.3.4:99999"}, "--health: expected HOST:PORT or PORT"),
        ({"concurrency_per_handler": "a"}, "--concurrency-per-handler: expected handler=number"),
        ({"concurrency_per_handler": "a=0"}, "numbers from 1 to 10000"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(flags: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings.read(flags, {})
    assert text in str(raised.value)


def test_a_wrong_variable_is_told_with_its_name() -> None:
    with pytest.raises(ConfigurationError, match="SAGACITY_CONCURRENCY: expected an integer"):
        Settings.read({}, {"SAGACITY_CONCURRENCY": "many"})


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(ConfigurationError, match=r"Settings\.batch_max: expected an integer"):
        Settings(batch_max=0)
    with pytest.raises(ConfigurationError, match=r"Settings\.lease_s"):
        Settings(lease_s="30")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("reclaim_idle_ms", {"reclaim_idle_ms": 29_999}),
        ("inbox_days", {"outbox_days": 15.0}),
        ("finished_days", {"finished_days": 13.0}),
        ("in_flight_bytes_max", {"in_flight_bytes_max": 1024}),
        ("backoff_cap_s", {"backoff_cap_s": 0.4}),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    name: str, values: dict[str, float]
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings(**values)  # type: ignore[arg-type]
    field = next(field for field in fields() if field.name == name)
    assert str(raised.value).startswith(f"{field.flag} ({field.variable}): expected at least")


def test_no_secret_shows() -> None:
    settings = Settings(
        store="postgresql+asyncpg://shop:hunter2@db/shop", bus="rediss://:opensesame@r:1/0"
    )
    for text in (repr(settings), str(settings), str(settings.__rich_repr__()), f"{settings}"):
        assert "hunter2" not in text
        assert "opensesame" not in text
    assert "shop:***@db/shop" in repr(settings)


def test_a_wrong_url_shows_no_secret() -> None:
    with pytest.raises(ConfigurationError) as raised:
        msgspec.structs.replace(Settings(), store=5)
    assert "Settings.store" in str(raised.value)


def test_settings_pass_to_another_process_through_the_environment() -> None:
    settings = Settings(
        store="memory:",
        bus="memory:",
        concurrency_per_handler={"a": 2, "b": 3},
        lease_s=1.5,
        log_format="json",
        health="127.0.0.1:0",
    )
    assert Settings.read({}, settings.environment()) == settings
    inherited = {
        "SAGACITY_BATCH_MAX": "7",
        "SAGACITY_STORE_FILE": "/absent",
        **settings.environment(),
    }
    assert Settings.read({}, inherited) == settings, "nothing of the environment shines through"


def test_retention_is_in_microseconds() -> None:
    retention = Settings(inbox_days=1.5, outbox_days=0.5).retention
    assert (retention.inbox_us, retention.outbox_us) == (DAY_US * 3 // 2, DAY_US // 2)
    assert retention.finished_us == 30 * DAY_US


def test_limits_reach_the_core() -> None:
    limits = Settings(state_bytes_max=100, payload_bytes_max=200, commands_max=3).limits
    assert (limits.state_bytes_max, limits.payload_bytes_max, limits.commands_max) == (100, 200, 3)
    assert Settings().limits == Limits()
    assert Settings(missing_window_s=0.5).retry.missing_us == 500_000
    assert Settings().retry == Retry()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:8080", ("0.0.0.0", 8080)),
        ("[::1]:0", ("::1", 0)),
    ],
)
def test_a_health_address_without_a_host_is_local(
    text: str, address: tuple[str, int] | None
) -> None:
    assert Settings(health=text).health_address == address


def test_a_variable_nobody_reads_is_told_with_the_nearest_one() -> None:
    environment = {
        "SAGACITY_BATCHMAX": "1",
        "SAGACITY_BATCH_MAX": "1",
        "SAGACITY_WORKERS": "2",
        "SAGACITY_BUS_FILE": "x",
        "SAGACITY_TEST_REDIS_URL": "x",
        "PATH": "x",
    }
    assert unknown_variables(environment, others=["SAGACITY_WORKERS"]) == [
        "SAGACITY_BATCHMAX is read by nobody; SAGACITY_BATCH_MAX?"
    ]


def test_every_setting_is_described() -> None:
    for field in fields():
        assert field.description.endswith("."), field.name
        assert field.section, field.name
        assert field.expected, field.name
