"""Finds the service that ``module:attribute`` names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

from sagacity.core.errors import ConfigurationError
from sagacity.service import Service

__all__ = ["load_service"]

DEFAULT_ATTRIBUTE = "service"


def load_service(target: str, *, app_dir: str = ".", factory: bool = False) -> Service:
    """Imports the module and returns its service; ``:service`` may be left out.

    `app_dir` is searched first. With `factory` the attribute is called without arguments. Raises
    ConfigurationError for a target that is not there or is no service, and DefinitionError for a
    service that is declared wrongly; an error of the module's own code is raised as it is.
    """
    name, _, attribute = target.partition(":")
    attribute = attribute or DEFAULT_ATTRIBUTE
    is_path = "/" in name or name.endswith(".py")
    if is_path or not _is_dotted(name) or not _is_dotted(attribute):
        hint = ""
        if is_path:
            dotted = name.removesuffix(".py").strip("./").replace("/", ".")
            hint = f"; {dotted}:{attribute}?"
        raise ConfigurationError(
            f"{target!r} names no service: expected module:attribute such as shop.accounts:service"
            f"{hint}"
        )
    directory = str(Path(app_dir).resolve())
    if not Path(directory).is_dir():
        raise ConfigurationError(f"--app-dir: expected a directory, got {app_dir!r}")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    module = _module(name, directory)
    found = _attribute(module, attribute)
    if factory:
        if isinstance(found, Service) or not callable(found):
            raise ConfigurationError(
                f"--factory: expected {name}:{attribute} to be a function that returns a Service, "
                f"got {_noun(found)}"
            )
        found = found()
    if not isinstance(found, Service):
        hint = ""
        if callable(found) and not isinstance(found, type):
            hint = "; add --factory to have it called"
        elif _services(module):
            hint = f"; {name}:{_services(module)[0]}?"
        raise ConfigurationError(
            f"{name}:{attribute} is no service: expected a sagacity.Service, "
            f"got {_noun(found)}{hint}"
        )
    return found


def _module(name: str, directory: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only if the module itself, or a package it is in, is the one that is missing; any other
        # missing import is a fault inside the user's code and deserves its traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ConfigurationError(
            f"there is no module {name!r}: expected it in {directory} or installed, "
            f"and did not find {error.name!r}; see --app-dir"
        ) from None


def _attribute(module: ModuleType, dotted: str) -> object:
    found: object = module
    for part in dotted.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = _services(module) or difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; {module.__name__}:{near[0]}?" if near else ""
            raise ConfigurationError(
                f"module {module.__name__!r} ({module.__file__}) has no {dotted!r}: expected a "
                f"sagacity.Service of that name{hint}"
            ) from None
    return found


def _services(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, Service)]


def _noun(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    if inspect.isfunction(found):
        return f"the function {found.__name__}"
    return f"a {type(found).__name__}"


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
