from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sagacity.cli.load import load_service
from sagacity.core.errors import ConfigurationError


def test_a_service_is_found_by_name_and_by_default() -> None:
    assert load_service("tests.cli.services:service").name == "shop"
    assert load_service("tests.cli.services").name == "shop"
    assert load_service("tests.cli.services:make_service", factory=True).name == "made"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("tests.cli.nothing:service", "there is no module 'tests.cli.nothing'"),
        ("nothing.at.all", "did not find 'nothing'"),
        ("tests.cli.services:servise", "has no 'servise'.*tests.cli.services:service\\?"),
        ("tests.cli.services:Order", "got the class Order; tests.cli.services:service\\?"),
        ("tests.cli.services:not_a_service", "got a str"),
        ("tests.cli.services:make_service", "got the function make_service; add --factory"),
        ("tests/cli/services.py:service", "names no service.*; tests.cli.services:service\\?"),
        ("services.py", "names no service.*; services:service\\?"),
        ("a b:c", "names no service: expected module:attribute"),
        ("", "names no service"),
    ],
)
def test_what_cannot_be_loaded_is_told_with_a_way_out(target: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s){text}"):
        load_service(target)


def test_a_factory_must_be_a_function_that_returns_a_service() -> None:
    with pytest.raises(ConfigurationError, match="--factory: expected"):
        load_service("tests.cli.services:service", factory=True)
    with pytest.raises(ConfigurationError, match="got a PosixPath"):
        load_service("tests.cli.services:Path", factory=True)


def test_the_app_directory_is_searched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "only_here.py").write_text(
        "from sagacity import Service\nservice = Service('here')\n"
    )
    assert load_service("only_here", app_dir=str(tmp_path)).name == "here"
    with pytest.raises(ConfigurationError, match="--app-dir: expected a directory"):
        load_service("only_here", app_dir=str(tmp_path / "absent"))


def test_an_import_that_fails_inside_the_module_is_not_mistaken_for_a_missing_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load_service("needs_more", app_dir=str(tmp_path))
