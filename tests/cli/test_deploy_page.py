"""What the deployment page tells readers to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from sagacity.cli import operator, worker

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "deploy.md"


def known(command: click.Command) -> set[str]:
    return {option for param in command.params for option in param.opts} | {"--help"}


def test_every_flag_on_the_page_exists() -> None:
    text = PAGE.read_text()
    everything = known(worker.main)
    for command in operator.main.commands.values():
        parts = command.commands.values() if isinstance(command, click.Group) else [command]
        for part in parts:
            everything |= known(part)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert flags
    assert flags <= everything


def test_every_command_of_saga_on_the_page_exists_with_its_flags() -> None:
    lines = re.findall(r"^\$ (saga .*?)(?:\s+#.*|\s*>.*)?$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        _, *words = shlex.split(line)
        command: click.Command = operator.main
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not operator.main, line
        assert {word for word in words if word.startswith("--")} <= known(command), line
