"""The tutorial's last step, done: a worker on SQLite and Redis, two orders, and the operator's look."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.cli.process import Command
from tests.docs.pages import CHECKOUT, Block, blocks, saved_as
from tests.waiting import eventually

SAGA = str(Path(sys.executable).with_name("saga"))
PAGE = CHECKOUT / "docs/tutorial/index.md"


def files() -> dict[str, str]:
    """shop.py and place.py as the reader has them."""
    found = [
        block for block in blocks(PAGE.read_text(encoding="utf-8")) if block.language == "python"
    ]
    last = next(index for index, block in enumerate(found) if saved_as(block) == "shop.py")
    shop: list[Block] = found[: last + 1]
    (place,) = (block for block in found if block.mark == "alone")
    return {"shop.py": "\n\n".join(block.text for block in shop), "place.py": place.text}


def test_the_tutorial_runs_for_real(tmp_path: Path, redis_url: str) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    servers = {"SAGACITY_STORE": "sqlite+aiosqlite:///shop.db", "SAGACITY_BUS": redis_url}

    def asked(*arguments: str) -> str:
        done = subprocess.run(
            arguments,
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **servers},
        )
        return done.stdout

    def ended(key: str, status: str) -> bool:
        told = asked(SAGA, "show", "Order", key, "--json")
        return bool(told) and json.loads(told)["about"]["status"] == status

    with Command("shop:service", directory=tmp_path, environment=servers) as worker:
        worker.until("joined its group")
        asked(sys.executable, "place.py")
        eventually(lambda: ended("o1", "completed"), "order o1 being shipped")
        eventually(lambda: ended("o2", "compensated"), "order o2 being paid back")
        assert "40 back to o2" in worker.output
        listed = asked(SAGA, "list")
        assert "o1" in listed
        assert "compensated" in listed
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 0
