"""The how-to page on recording events runs as it stands."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "record-events.md"

EXPECTED = """\
event orders.OrderRepriced carries the entity Order; expected ids and plain values; put the entity's \
id and the changed values into the event
('orders.OrderPlaced', b'{"ref":"o1","total":30}')
placed o3
placed o4
show o5
heard o5
"""


@pytest.mark.requirement("R44", "R45", "R50", "R52", "R56")
@pytest.mark.asyncio
async def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    page = ModuleType("page")  # SQLAlchemy looks annotations up in the module of the class
    monkeypatch.setitem(sys.modules, "page", page)
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        line = text[: block.start()].count("\n") + 1
        tree = ast.increment_lineno(ast.parse(block[1]), line)
        code = compile(tree, str(PAGE), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, vars(page))
        if inspect.isawaitable(result):
            await result
    assert capsys.readouterr().out == EXPECTED
