"""Systems that take turns, and what becomes of one that fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks import measuring, systems
from benchmarks.cases import IDLE, happy
from benchmarks.measuring import Ledger, Turns
from benchmarks.servers import Place, Servers
from benchmarks.systems import System, bare_parts

pytestmark = pytest.mark.server


@pytest.fixture
def servers() -> Iterator[Servers]:
    with Servers() as made:
        yield made


def python(name: str, code: str) -> System:
    """A system that is this program."""

    def start(place: Place) -> subprocess.Popen[bytes]:
        with place.log.open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)

    return System(name, "nothing", start)


def turns(servers: Servers, ledger: Ledger) -> Turns:
    return Turns(servers, "sqlite", ledger, seconds=0.01)


def quiet() -> Ledger:
    return Ledger(say=lambda _: None)


def test_the_bare_parts_are_measured_in_turn(servers: Servers) -> None:
    ledger = quiet()
    with turns(servers, ledger) as up:
        up.add([bare_parts(overlap=False), bare_parts(overlap=True)])
        up.measure(lambda _: [IDLE, happy(20)], 2)
    assert not ledger.failures
    order = [(one.system.partition("+")[2], one.workload) for one in ledger.repeats]
    once = [("in turn", "idle"), ("overlap", "idle"), ("in turn", "happy"), ("overlap", "happy")]
    assert order == once * 2
    assert all(one.steps_per_s > 0 and one.p50_ms > 0 and one.rss_mb > 10 for one in ledger.repeats)
    assert [one["repeat"] for one in ledger.details] == [0] * 4 + [1] * 4


def test_a_system_that_does_not_take_part_is_told_with_its_log(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "LOAD_DEADLINE_S", 1.0)
    ledger = quiet()
    with turns(servers, ledger) as up:
        up.add(
            [
                python("idler", "import time; print('so far', flush=True); time.sleep(60)"),
                bare_parts(overlap=False),
            ]
        )
        up.measure(lambda _: [happy(10)], 1)
    [failure] = ledger.failures
    assert failure.startswith("sqlite, start: idler: warm-up")
    assert failure.endswith("so far")
    assert [one.system for one in ledger.repeats] == ["bare-parts+in turn"]


def test_a_system_that_dies_is_left_out_from_then_on(servers: Servers) -> None:
    ledger = quiet()
    with turns(servers, ledger) as up:
        up.add([bare_parts(overlap=False), bare_parts(overlap=True)])
        [first, _] = up.running
        first.process.kill()
        first.process.wait()
        up.measure(lambda _: [happy(10)], 2)
    assert len(ledger.failures) == 1
    assert "ended with status -9" in ledger.failures[0]
    assert {one.system for one in ledger.repeats} == {"bare-parts+overlap"}
    assert len(ledger.repeats) == 2


def test_one_that_ends_before_it_is_ready_says_why(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "CHECKOUT", systems.CHECKOUT / "docs")  # no benchmarks there
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ledger = quiet()
    with turns(servers, ledger) as up:
        up.add([bare_parts(overlap=False)])
    [failure] = ledger.failures
    assert "No module named" in failure
