"""The figures of a run in a terminal: with `rich` where it is installed, else plain."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.results import Ratio, Row, Run, commits_less

HEAD = (
    "system",
    "store",
    "workload",
    "workers",
    "at once",
    "steps/s",
    "sagas/s",
    "p50 ms",
    "p99 ms",
    "MB",
)


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    return [
        (
            row.system + (" *" if commits_less(row) else ""),
            row.store,
            row.workload,
            str(row.workers),
            str(row.concurrency or "open"),
            f"{row.steps_per_s:,.0f}",
            f"{row.sagas_per_s:,.0f}",
            f"{row.p50_ms:,.1f}",
            f"{row.p99_ms:,.1f}",
            f"{row.rss_mb:,.0f}",
        )
        for row in sorted(
            rows, key=lambda row: (row.store, row.workload, row.system, row.concurrency)
        )
    ]


def ratio_lines(found: Sequence[Ratio]) -> list[tuple[str, ...]]:
    """The cells of the table of ratios."""
    return [
        (one.name, one.store, f"{one.value:.2f}", one.target, "yes" if one.met else "NO", one.of)
        for one in found
    ]


def show(rows: Sequence[Row], run: Run, found: Sequence[Ratio]) -> None:
    """Prints everything."""
    _table(f"{run.form} form, {run.date}, {run.seconds:g} s", HEAD, lines(rows))
    _table("ratios", ("", "store", "ratio", "target", "met", "of"), ratio_lines(found))
    if any(map(commits_less, rows)):
        print("* commits less at each step than ours")
    for what in run.left_out:
        print(f"left out: {what}")


def _table(title: str, head: Sequence[str], cells: Sequence[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        print(f"\n{title}")
        for line in (head, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(title=title)
    for name in head:
        table.add_column(name, justify="left" if name in {*HEAD[:3], "", "of"} else "right")
    for line in cells:
        table.add_row(*line)
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)
