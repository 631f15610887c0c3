"""Which tests cover which requirement: makes docs/reference/requirements.md.

``python -m tests.requirements_table`` writes the page, ``--check`` only compares. Rows come from
``requirements-rows.toml`` beside the page, coverage from the `requirement` and `outcome` markers in
the source of the tests, so nothing has to run and no optional import can hide a test.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
ROWS = CHECKOUT / "docs/reference/requirements-rows.toml"
PAGE = CHECKOUT / "docs/reference/requirements.md"
MARKERS = ("requirement", "outcome")

HEAD = """\
# Requirements and the tests that cover them

<!-- Made by `make requirements` from requirements-rows.toml and the markers of the tests. -->

A test that covers a row carries the marker `requirement` or `outcome` with its number.
"""


class MarkerError(ValueError):
    """A marker names a row that does not exist, or not by a plain string."""


def marked_rows(nodes: Iterable[ast.AST], where: str) -> Iterator[str]:
    """The rows named by every `requirement(...)` or `outcome(...)` call within `nodes`."""
    for node in nodes:
        for call in ast.walk(node):
            if not (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in MARKERS
            ):
                continue
            for argument in call.args:
                if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                    raise MarkerError(
                        f"{where}:{call.lineno}: {call.func.attr}() expects plain strings such as "
                        f'"R12", got {ast.unparse(argument)}'
                    )
                yield argument.value


def module_marks(tree: ast.Module) -> list[ast.AST]:
    """The values assigned to `pytestmark` at the top of a module."""
    return [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(name, ast.Name) and name.id == "pytestmark" for name in node.targets)
    ]


def rows_of_tests(source: str, where: str) -> Iterator[tuple[str, str]]:
    """(row, test) for one test file; a test in a class is named ``Class::test``."""
    tree = ast.parse(source, where)

    def visit(
        body: list[ast.stmt], inherited: list[ast.AST], prefix: str
    ) -> Iterator[tuple[str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                marks = [*inherited, *node.decorator_list]
                yield from visit(node.body, marks, f"{prefix}{node.name}::")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
                "test"
            ):
                for row in marked_rows([*inherited, *node.decorator_list], where):
                    yield row, f"{prefix}{node.name}"

    yield from visit(tree.body, module_marks(tree), "")


def coverage(tests: Path, known: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Row -> test file (relative to the checkout) -> names of its tests, in the file's order."""
    rows = set(known)
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(tests.rglob("test_*.py")):
        where = path.relative_to(tests.parent).as_posix()
        for row, test in rows_of_tests(path.read_text(encoding="utf-8"), where):
            if row not in rows:
                raise MarkerError(f"{where}: {test} names the row {row}, which {ROWS.name} has not")
            if test not in found[row][where]:
                found[row][where].append(test)
    return found


def table(rows: dict[str, str], covered: dict[str, dict[str, list[str]]]) -> str:
    lines = ["| Row | What must hold | Tests |", "|---|---|---|"]
    for row, text in rows.items():
        tests = "<br>".join(
            f"`{path}`: {', '.join(f'`{name}`' for name in names)}"
            for path, names in covered.get(row, {}).items()
        )
        lines.append(f"| {row} | {text} | {tests or '-'} |")
    return "\n".join(lines)


def page(tests: Path = CHECKOUT / "tests") -> str:
    """The whole page as it should be now."""
    groups: dict[str, dict[str, str]] = tomllib.loads(ROWS.read_text(encoding="utf-8"))
    covered = coverage(tests, [row for group in groups.values() for row in group])
    total = sum(len(group) for group in groups.values())
    parts = [HEAD, f"{len(covered)} of {total} rows are covered.\n"]
    titles = {"requirements": "Requirements", "outcomes": "Outcomes of the example program"}
    for name, rows in groups.items():
        parts.append(f"## {titles[name]}\n\n{table(rows, covered)}\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    expected = page()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != expected
    if "--check" in arguments:
        if stale:
            print(
                f"{PAGE.relative_to(CHECKOUT)} is stale; run `make requirements`", file=sys.stderr
            )
        return int(stale)
    if stale:
        PAGE.write_text(expected, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(CHECKOUT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
