"""Every setting as a command line option, listed by subject in ``--help``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import click

from sagacity.core.errors import ConfigurationError
from sagacity.worker.config import Field, Settings, fields

__all__ = ["SectionedCommand", "SettingOption", "read_settings", "setting_options"]

F = TypeVar("F", bound=Callable[..., Any])

_SHORT: Final = {"log_level": "-l"}
_METAVARS: Final = {
    "store": "URL",
    "bus": "URL",
    "health": "[HOST:]PORT",
    "log_level": "LEVEL",
    "log_format": "FORMAT",
}


class SettingOption(click.Option):
    """An option that stands for one field of `Settings`; its text is checked there."""

    def __init__(self, field: Field) -> None:
        self.section = field.section
        names = [field.flag] + ([_SHORT[field.name]] if field.name in _SHORT else [])
        super().__init__(
            [f"setting_{field.name}", *names],
            metavar=_METAVARS.get(field.name, _metavar(field)),
            help=_help(field),
        )


class SectionedCommand(click.Command):
    """A command whose ``--help`` groups options by their `section`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one list per section; own options first."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = getattr(parameter, "section", "Options")
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def setting_options(*, only: Iterable[str] = ()) -> Callable[[F], F]:
    """Decorates a click callback with the options of all settings, or of `only` these."""
    wanted = frozenset(only)
    chosen = [field for field in fields() if not wanted or field.name in wanted]

    def decorate(function: F) -> F:
        params: list[click.Parameter] = getattr(function, "__click_params__", [])
        params.extend(SettingOption(field) for field in reversed(chosen))
        function.__click_params__ = params  # type: ignore[attr-defined]
        return function

    return decorate


def read_settings(options: dict[str, Any]) -> Settings:
    """The settings that the options name; takes them out of `options`.

    Raises click.UsageError, which prints one line and exits with status 2.
    """
    flags: dict[str, str] = {}
    for name in [name for name in options if name.startswith("setting_")]:
        value = options.pop(name)
        if value is not None:
            flags[name.removeprefix("setting_")] = value
    try:
        return Settings.read(flags)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None


def _metavar(field: Field) -> str:
    if isinstance(field.default, dict):
        return "NAME=N,..."
    return "TEXT" if isinstance(field.default, str) else "N"


def _help(field: Field) -> str:
    # Ranges are told where a value is out of them, and in the reference; here they would be noise.
    default = field.text(field.default)
    return f"{field.description}  [{default}]" if default else field.description
