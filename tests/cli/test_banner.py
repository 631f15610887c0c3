from __future__ import annotations

import click

from sagacity.cli.banner import banner
from sagacity.worker.config import Settings
from tests.cli.services import service


def test_the_banner_tells_all_that_matters_and_no_secret() -> None:
    settings = Settings(
        store="postgresql+asyncpg://shop:hunter2@db/shop", bus="redis://:opensesame@r:6379/0"
    )
    lines = [click.unstyle(line) for line in banner(service, settings, workers=3, health="8080")]
    text = "\n".join(lines)
    assert "  shop  pid " in lines[1]
    for line in (
        "saga         Order by ref",
        "  states     charging, [paid]",
        "  begins on  orders.Ordered",
        "  hears      payments.Charged",
        "  sends      payments.Charge",
        "handles      payments.Block, payments.Charge, payments.Refund",
        "listens to   orders, payments, shop.replies",
        "store        postgresql+asyncpg://shop:***@db/shop",
        "bus          redis://:***@r:6379/0  (prefix sagacity)",
        "runs as      3 processes, 16 handlers at a time each, health on 8080",
    ):
        assert line in lines
    assert "256 KiB a message" in text
    assert "hunter2" not in text
    assert "opensesame" not in text


def test_a_narrow_terminal_gets_narrow_lines() -> None:
    wide = banner(service, Settings(), width=100)
    narrow = [click.unstyle(line) for line in banner(service, Settings(), width=50)]
    assert len(narrow) > len(wide)
    # A URL is one word.
    assert max(len(line) for line in narrow[2:] if "://" not in line) <= 50
