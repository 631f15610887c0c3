"""House rules that a linter does not know: names, dead modules, documentation, leftovers."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SOURCE = CHECKOUT / "src"
CODE = tuple(
    name for name in ("src", "examples", "benchmarks", "tests") if (CHECKOUT / name).exists()
)
BANNED_WORDS = {"manager", "helper", "helpers", "util", "utils", "base", "misc", "common"}
LEFTOVER = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X]|HAC[K])\b")  # so written, this line is none
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:root|work|home/\w+|Users/\w+)/")
TEXT_SUFFIXES = {"", ".cfg", ".css", ".html", ".js", ".md", ".py", ".sh", ".sql", ".toml", ".yml"}


def python_files(*roots: str) -> Iterator[Path]:
    for root in roots:
        yield from sorted(_inside(CHECKOUT / root, ".py"))


def _inside(folder: Path, suffix: str = "") -> Iterator[Path]:
    """The files below a folder; environments and caches have names with a dot."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / name for name in names if name.endswith(suffix))


def text_files() -> Iterator[Path]:
    folders = [name for name in (*CODE, "docs", ".ci") if (CHECKOUT / name).exists()]
    for path in [
        *CHECKOUT.iterdir(),
        *(each for f in folders for each in _inside(CHECKOUT / f)),
    ]:
        if path.is_file() and path.suffix in TEXT_SUFFIXES and not path.name.startswith("."):
            yield path


def words(name: str) -> set[str]:
    """The words of a ``snake_case`` or ``CamelCase`` name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def shown(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


# --- names -------------------------------------------------------------------------------------


def test_names_say_what_a_thing_is() -> None:
    """No module, folder or class is called after nothing: manager, helper, util, base."""
    found = [
        f"{shown(path)}: {part}"
        for path in python_files(*CODE)
        for part in (path.stem, path.parent.name)
        if words(part) & BANNED_WORDS
    ]
    found += [
        f"{shown(path)}:{node.lineno}: class {node.name}"
        for path in python_files(*CODE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and words(node.name) & BANNED_WORDS
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SagaManager", {"saga", "manager"}),
        ("string_utils", {"string", "utils"}),
        ("HTTPHelper", {"http", "helper"}),
        ("Database", {"database"}),
    ],
)
def test_names_are_split_into_words(name: str, expected: set[str]) -> None:
    assert words(name) == expected


# --- dead modules ------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def prefixes(name: str) -> set[str]:
    """``a.b.c`` and the packages above it."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, and each name imported from one, as dotted names."""
    found: set[str] = set()
    package = module_name(path) if path.is_relative_to(SOURCE) else ""
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = found.union(*(prefixes(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # a module loaded by name, as lazy commands and plug-ins are
            found |= set(re.findall(r"^sagacity(?:\.\w+)+", node.value))
    return found


def entry_points() -> set[str]:
    """The modules that the installed package is entered by."""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = [project.get("scripts", {}), *project.get("entry-points", {}).values()]
    return {target.partition(":")[0] for group in groups for target in group.values()}


def documented_modules() -> set[str]:
    """The modules that a reader of the documentation is told to import."""
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]
    pages = [page for page in pages if page.exists() and "decisions" not in page.parts]
    named: set[str] = set()
    for page in pages:
        names = re.findall(r"\bsagacity(?:\.\w+)+", page.read_text(encoding="utf-8"))
        named = named.union(*map(prefixes, names))
    return named


def test_no_module_is_dead() -> None:
    """Every module is imported by another, run as a command, or offered in the documentation."""
    modules = {module_name(path): path for path in python_files("src")}
    alive = entry_points() | documented_modules()
    for path in python_files("src"):
        alive |= imported_names(path) - {module_name(path)}
    for path in python_files(*(root for root in CODE if root in {"examples", "benchmarks"})):
        alive |= imported_names(path)
    dead = [
        shown(path)
        for name, path in modules.items()
        # a package lives through its modules, and __main__ is run by name
        if path.name not in {"__init__.py", "__main__.py"} and name not in alive
    ]
    assert not dead, f"nobody uses these modules: {dead}"


def test_imports_are_read_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_tidy.SOURCE", tmp_path)
    path = tmp_path / "sagacity" / "worker" / "loop.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import sagacity.codec as codec\n"
        "from sagacity.core import plan\n"
        "from . import relay\n"
        "from .. import ports\n"
        "from .timeouts import due\n"
        "COMMANDS = {'dev': 'sagacity.cli.dev:main'}\n"
    )
    assert imported_names(path) >= {
        "sagacity.codec",
        "sagacity.core.plan",
        "sagacity.worker.relay",
        "sagacity.ports",
        "sagacity.worker.timeouts",
        "sagacity.cli.dev",
    }


# --- public names ------------------------------------------------------------------------------


def test_public_names_are_sorted_exported_once_and_documented() -> None:
    package = importlib.import_module("sagacity")
    names: list[str] = list(getattr(package, "__all__", []))
    assert names == sorted(set(names))
    undocumented = []
    for name in names:
        value = getattr(package, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        if not text or text.startswith(f"{name}("):  # what dataclass writes where nobody did
            undocumented.append(name)
    assert not undocumented, f"public names without a docstring: {undocumented}"


# --- leftovers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [LEFTOVER, MACHINE_PATH], ids=["marker", "machine-path"])
def test_no_leftovers(pattern: re.Pattern[str]) -> None:
    """No marker of unfinished work, and no path of somebody's machine."""
    found = [
        f"{shown(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_leftover_patterns_find_what_they_should() -> None:
    for marker in ("todo", "fixme", "xxx"):
        assert LEFTOVER.search(f"# {marker.upper()}: later")
    assert not LEFTOVER.search("TODOS")
    for directory in ("root", "work", "home/somebody", "Users/somebody"):
        assert MACHINE_PATH.search(f"open('/{directory}/file')")
        assert not MACHINE_PATH.search(f"https://example.org/{directory}/file")
