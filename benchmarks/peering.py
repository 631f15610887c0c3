"""The peers of `benchmarks.peers` as systems."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.results import STORES, Run
from benchmarks.servers import Place
from benchmarks.systems import System, SystemFailed


def peer_names() -> set[str]:
    """The names of all peers, installed or not."""
    try:
        return {
            name.replace("_", "-") for name in importlib.import_module("benchmarks.peers").PEERS
        }
    except (ImportError, AttributeError):
        return set()


def peer_systems(
    only: set[str], run: Run, say: Callable[[str], None]
) -> tuple[list[System], list[str]]:
    """Every peer for each concurrency it is swept over, and why others are missing.

    Notes versions, and what cannot be measured, in `run`.
    """
    versions = run.versions
    try:
        peers: Any = importlib.import_module("benchmarks.peers")
        table: dict[str, Any] = peers.PEERS
    except (ImportError, AttributeError) as error:
        return [], [f"peers: none are there ({error})"]
    systems: list[System] = []
    missing: list[str] = []
    for name, facts in table.items():
        shown = name.replace("_", "-")
        if only and shown not in only:
            continue
        say(f"installing {shown}, unless it is there")
        try:
            peers.install(name)
        except Exception as error:  # noqa: BLE001 - whatever an installation fails with is reported
            missing.append(f"{shown}: cannot be installed: {error}")
            say(f"FAILED {missing[-1]}")
            continue
        versions[shown] = facts.requirements[0].partition("==")[2]
        for store, concurrencies in facts.concurrencies.items():
            systems += [
                System(
                    shown,
                    facts.durable,
                    _start(peers, name, concurrency),
                    stores=(store,),
                    over=facts.over,
                    tuned_for=concurrency,
                )
                for concurrency in concurrencies
            ]
        if facts.without:
            run.left_out.append(f"{shown} on {_missing_store(facts)}: {facts.without}")
    return systems, missing


def _missing_store(facts: Any) -> str:
    return ", ".join(store for store in STORES if store not in facts.concurrencies)


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
