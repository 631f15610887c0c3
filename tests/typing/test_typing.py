"""Users' code type-checks without a plugin, and wrong uses do not."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.typing.users import facts

CHECKOUT = Path(__file__).parents[2]
USERS = Path(__file__).with_name("users.py")
WRONG_USES = Path(__file__).with_name("wrong_uses.txt")

Found = dict[str, dict[int, str]]
"""File name -> line -> what a checker says of it."""


def mypy(paths: list[Path], cache: Path) -> Found:
    options = ["--strict", "--no-error-summary", "--no-pretty", f"--cache-dir={cache}"]
    command = [sys.executable, "-m", "mypy", *options, *map(str, paths)]
    ran = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert ran.returncode in {0, 1}, ran.stdout + ran.stderr
    found: Found = {path.name: {} for path in paths}
    for file, line, text in re.findall(r"^(.*?):(\d+): error: (.*)$", ran.stdout, re.MULTILINE):
        found[Path(file).name][int(line)] = text
    return found


def pyright(paths: list[Path]) -> Found:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    ran = subprocess.run(
        [*command, *map(str, paths)],
        cwd=paths[-1].parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in {0, 1}, ran.stdout + ran.stderr
    found: Found = {path.name: {} for path in paths}
    for said in json.loads(ran.stdout)["generalDiagnostics"]:
        if said["severity"] == "error":
            line = said["range"]["start"]["line"] + 1
            found[Path(said["file"]).name][line] = said["message"]
    return found


@pytest.fixture(scope="module", params=["mypy", "pyright"])
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Found:
    """What one checker says of both files; it is started once, because that takes seconds."""
    checker = str(request.param)
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    wrong = tmp_path_factory.mktemp("typing") / "wrong_uses.py"
    wrong.write_text(WRONG_USES.read_text(encoding="utf-8"), encoding="utf-8")
    if checker == "pyright":
        return pyright([USERS, wrong])
    assert pytestconfig.cache is not None
    return mypy([USERS, wrong], pytestconfig.cache.mkdir("mypy"))


@pytest.mark.requirement("R63")
def test_users_code_is_clean(found: Found) -> None:
    """The saga of the README, and all that handlers can say."""
    assert found["users.py"] == {}
    facts()


@pytest.mark.requirement("R28")
def test_wrong_uses_are_refused(found: Found) -> None:
    """Each line marked so, and no other: among them an event that should publish itself."""
    source = WRONG_USES.read_text(encoding="utf-8").splitlines()
    expected = {n for n, line in enumerate(source, 1) if line.endswith("# refused")}
    assert found["wrong_uses.py"].keys() == expected, found["wrong_uses.py"]
