"""The three services share their messages and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import examples.batch_import
from examples.batch_import.contexts import SERVICES, tables_of
from examples.batch_import.processes import ROOT

PACKAGE: Final = "examples.batch_import"
DIRECTORY: Final = Path(examples.batch_import.__path__[0])
SEEN_BY_ALL: Final = {"checking", "status", "figures", "contexts", "program", "demo", "cli"}
"""What looks at all services from outside; no service may import it."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached_from(service: str) -> set[str]:
    """Every module of the example that a service imports, however indirectly."""
    reached: set[str] = set()
    waiting = list((DIRECTORY / service).rglob("*.py"))
    while waiting:
        for name in imports_of(waiting.pop()):
            if not name.startswith(PACKAGE + ".") or name in reached:
                continue
            reached.add(name)
            path = DIRECTORY.joinpath(*name.removeprefix(PACKAGE + ".").split("."))
            found = [path.with_suffix(".py"), path / "__init__.py"]
            waiting += [file for file in found if file.is_file()]
    return reached


@pytest.mark.requirement("R2", "R15")
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_reaches_no_other_service(service: str) -> None:
    reached = {name.removeprefix(PACKAGE + ".").partition(".")[0] for name in reached_from(service)}
    assert "messages" in reached
    assert not reached & (set(SERVICES) - {service})
    assert not reached & SEEN_BY_ALL


@pytest.mark.requirement("R2", "R15")
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_boots_where_the_others_are_not_even_installed(service: str) -> None:
    others = [f"{PACKAGE}.{other}" for other in SERVICES if other != service]
    program = (
        "import sys\n"
        f"for name in {others!r}: sys.modules[name] = None\n"  # importing it raises
        f"from {PACKAGE}.{service}.service import service\n"
        "print(service.name)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == service


@pytest.mark.requirement("R6")
@pytest.mark.parametrize("service", SERVICES)
def test_the_tables_of_a_service_refer_to_no_others(service: str) -> None:
    tables = tables_of(service).tables
    assert tables
    for name, table in tables.items():
        assert name.startswith(f"{service}_")
        assert {key.column.table.name for key in table.foreign_keys} <= tables.keys()
