from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from sagacity.worker.logs import HumanFormatter, JsonFormatter, configure, escaped, statement

HOSTILE = "a\r\nERROR forged\x1b[2J\u202egnp.exe\u200b\x00\x85\u2028"


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def record(
    text: str, *args: object, error: BaseException | None = None, **extra: object
) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.getLogger("sagacity.test").makeRecord(
        "sagacity.test", logging.WARNING, "f", 1, text, args, info, extra=extra
    )


def test_a_statement_lists_its_attributes() -> None:
    text = statement("Batch committed", {"count": 3, "saga_type": "Order", "took_s": 0.25})
    assert text == "Batch committed (count=3, saga_type=Order, took_s=0.25)"
    assert statement("Stopped", {}) == "Stopped"


def test_values_that_could_be_read_two_ways_are_quoted() -> None:
    text = statement("X", {"a": "b, c=d", "e": "", "f": 'say "hi"'})
    assert text == 'X (a="b, c=d", e="", f="say \\"hi\\"")'


def test_hostile_text_becomes_one_harmless_line() -> None:
    line = HumanFormatter().format(record("Got %s", HOSTILE, saga_key=HOSTILE))
    assert line.isprintable()
    assert "\\r\\nERROR forged\\x1b[2J\\u202egnp.exe\\u200b\\x00\\x85\\u2028" in line


def test_escaping_leaves_words_of_any_language_alone() -> None:
    assert escaped("Grüße 東京 🙂") == "Grüße 東京 🙂"
    assert escaped("\ud800") == "\\ud800"


def test_long_values_are_cut() -> None:
    assert escaped("x" * 1000, 10) == "xxxxxxxxxx... (1000 characters)"
    assert len(HumanFormatter().format(record("x" * 10**6, y="z" * 10**6))) < 6000


def test_json_lines_carry_attributes_as_they_are() -> None:
    entry = json.loads(JsonFormatter().format(record("Stuck", count=3, ok=True, key=HOSTILE)))
    assert entry["statement"] == "Stuck"
    assert entry["level"] == "warning"
    assert entry["logger"] == "sagacity.test"
    assert (entry["count"], entry["ok"], entry["key"]) == (3, True, HOSTILE)


def test_json_lines_are_ascii_on_one_line_and_strict() -> None:
    line = JsonFormatter().format(record("x", key=HOSTILE + "\ud800", number=float("nan"), o=[1]))
    assert line.isascii()
    assert line.isprintable()
    entry = json.loads(line)
    assert entry["number"] == "nan"
    assert entry["o"] == "[1]"


def test_an_attribute_never_hides_a_field_of_the_line() -> None:
    entry = json.loads(JsonFormatter().format(record("x", level="none", time="never")))
    assert entry["level"] == "warning"
    assert (entry["level_"], entry["time_"]) == ("none", "never")


def test_errors_come_with_their_traceback_and_without_secrets() -> None:
    try:
        raise ValueError("could not log in with hunter2\x1b[1m")
    except ValueError as error:
        failed = record("Failed", error=error)
    human = HumanFormatter(secrets=("hunter2",)).format(failed)
    assert "  | ValueError: could not log in with ***\\x1b[1m" in human
    assert "test_logs.py" in human
    entry = json.loads(JsonFormatter(secrets=("hunter2",)).format(failed))
    assert entry["error_type"] == "ValueError"
    assert "hunter2" not in entry["traceback"] + entry["error"]


@pytest.mark.usefixtures("restored_logging")
def test_configure_sends_everything_to_one_stream() -> None:
    stream = io.StringIO()
    configure(form="json", level="info", secrets=("hunter2",), stream=stream)
    logging.getLogger("shop").info("Hello %s", "hunter2")
    logging.getLogger("sqlalchemy.engine").info("not this")
    logging.getLogger("sagacity").debug("nor this")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["statement"] == "Hello ***"


def test_the_library_alone_prints_nothing() -> None:
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("sagacity").handlers)
