"""The blocks of a Markdown page, and what stands beside them for the tests.

A comment directly above a block says what is special about it:

    <!-- alone -->             it runs by itself, not after the other blocks of its page
    <!-- save as shop.py -->   the Python blocks so far are kept as this file, for the console blocks
    <!-- run -->               a console block whose commands are run and whose output is compared
    <!-- not run: reason -->   it is not run, and why
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

CHECKOUT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)(?P<rest>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(msgspec.Struct, frozen=True):
    """One fenced block."""

    language: str
    mark: str
    text: str
    line: int
    output: str | None
    """The ``text`` block directly below it, or below a console block the diagram that it prints."""


def pages() -> list[Path]:
    """Every page that a reader may open."""
    found = sorted((CHECKOUT / "docs").rglob("*.md"))
    return [CHECKOUT / "README.md", *(page for page in found if page.name != "0000-template.md")]


def name_of(page: Path) -> str:
    """The path of a page from the top of the checkout."""
    return page.relative_to(CHECKOUT).as_posix()


def blocks(source: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    fences = list(FENCE.finditer(source))
    made: list[Block] = []
    for index, fence in enumerate(fences):
        following = fences[index + 1] if index + 1 < len(fences) else None
        output = None
        if (
            following is not None
            and following["language"] == ("mermaid" if fence["language"] == "console" else "text")
            and not source[fence.end() : following.start()].strip()
        ):
            output = following["text"]
        line = source.count("\n", 0, fence.start("text"))
        made.append(Block(fence["language"], fence["mark"] or "", fence["text"], line, output))
    return made


def saved_as(block: Block) -> str:
    """The file name in its mark, or an empty string."""
    return block.mark.removeprefix("save as ") if block.mark.startswith("save as ") else ""
