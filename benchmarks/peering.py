"""The peers of `benchmarks.peers` as systems."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.servers import Place
from benchmarks.systems import System, SystemFailed


def peer_systems(only: set[str], say: Callable[[str], None]) -> tuple[list[System], list[str]]:
    """Every peer for each concurrency it is swept over, and why others are missing."""
    try:
        peers: Any = importlib.import_module("benchmarks.peers")
        table: dict[str, Any] = peers.PEERS
    except (ImportError, AttributeError) as error:
        return [], [f"peers: none are there ({error})"]
    systems: list[System] = []
    missing: list[str] = []
    for name, facts in table.items():
        if only and name not in only:
            continue
        say(f"installing {name}")
        try:
            peers.install(name)
        except Exception as error:  # noqa: BLE001 - whatever an installation fails with is reported
            missing.append(f"{name}: cannot be installed: {error}")
            say(f"FAILED {missing[-1]}")
            continue
        systems += [
            System(
                name,
                facts.durable,
                _start(peers, name, concurrency),
                stores=tuple(facts.stores),
                over=facts.over,
                tuned_for=concurrency,
            )
            for concurrency in facts.concurrencies
        ]
    return systems, missing


def _start(peers: Any, name: str, concurrency: int) -> Callable[[Place], subprocess.Popen[Any]]:
    def start(place: Place) -> subprocess.Popen[Any]:
        try:
            process: subprocess.Popen[Any] = peers.start(
                name, place.store, place.redis, concurrency
            )
        except Exception as error:
            raise SystemFailed(f"{name}: did not start: {error}") from error
        return process

    return start
