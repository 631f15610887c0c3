"""What the documentation shows is true: its programs run, and print what stands below them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import click
import pytest

from sagacity.cli.operator import main as saga
from sagacity.cli.worker import main as saga_worker
from tests.docs.pages import CHECKOUT, Block, blocks, name_of, pages, saved_as

LANGUAGES = {
    "",
    "console",
    "ini",
    "json",
    "mermaid",
    "python",
    "sql",
    "text",
    "toml",
    "yaml",
    "xml",
}
COMMANDS: dict[str, click.Command] = {"saga": saga, "saga-worker": saga_worker}
SHELL = {">", ">>", "<", "|", "&", "&&", "||", ";"}
BETWEEN = "\x1e"
"""Printed between two blocks, so that each one's output can be told from the next one's."""


def of_page(page: Path) -> list[Block]:
    return blocks(page.read_text(encoding="utf-8"))


def programs(found: list[Block]) -> Iterator[list[Block]]:
    """The Python blocks that run together: those of the page, and each that stands alone."""
    python = [b for b in found if b.language == "python" and not b.mark.startswith("not run")]
    together = [b for b in python if b.mark != "alone"]
    if together:
        yield together
    yield from ([b] for b in python if b.mark == "alone")


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if "SAGACITY_" not in name}
    return subprocess.run(
        arguments,
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
        env={**clean, "PATH": path, "PYTHONPATH": str(CHECKOUT), "NO_COLOR": "1"},
        timeout=100,
    )


RUNNER = """\
import ast, asyncio, inspect, sys
code = compile(open("program.py").read(), "program.py", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(eval(code, globals()))
else:
    exec(code, globals())
"""
"""A page may await where a reader would do so in an `async def` of his own."""


def check_program(page: Path, program: list[Block], directory: Path) -> None:
    (directory / "program.py").write_text(
        f"\nprint({BETWEEN!r})\n".join(block.text for block in program)
    )
    (directory / "run_program.py").write_text(RUNNER)
    done = run([sys.executable, "-W", "error", "run_program.py"], directory)
    where = f"{name_of(page)}:{program[0].line}"
    assert done.returncode == 0, f"{where}: the program failed\n{done.stdout}{done.stderr}"
    printed = done.stdout.split(f"{BETWEEN}\n")
    assert len(printed) == len(program), f"{where}: the program ended early"
    for block, text in zip(program, printed, strict=True):
        if block.output is not None:
            assert text == block.output, f"{name_of(page)}:{block.line} prints something else"


def check_console(page: Path, found: list[Block], directory: Path) -> None:
    """Runs the console blocks that ask for it, beside the files that the page saves."""
    so_far: list[str] = []
    for block in found:
        if block.language == "python" and not block.mark.startswith("not run"):
            so_far.append(block.text)
            if saved_as(block):
                (directory / saved_as(block)).write_text("\n".join(so_far))
        if block.language != "console" or block.mark != "run":
            continue
        for command, expected in sessions(block):
            done = run(shlex.split(command), directory)
            where = f"{name_of(page)}:{block.line}: {command}"
            assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
            assert done.stdout == (block.output or expected), where


def sessions(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what is shown below it)."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command = command[:-1] + more
        yield command, output


def parse(command: click.Command, name: str, arguments: list[str]) -> None:
    """Lets click read a command line, subcommands included, without doing anything."""
    context = click.Context(command, info_name=name)
    while True:
        if "--help" in arguments:
            return
        context = command.make_context(name, list(arguments), parent=context.parent)
        if not isinstance(command, click.Group):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        found_name, found, arguments = command.resolve_command(context, rest)
        assert found is not None
        assert found_name is not None
        context = click.Context(found, info_name=found_name, parent=context)
        command, name = found, found_name


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_programs_run_and_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    found = of_page(page)
    for number, program in enumerate(programs(found)):
        directory = tmp_path / str(number)
        directory.mkdir()
        check_program(page, program, directory)
    directory = tmp_path / "console"
    directory.mkdir()
    check_console(page, found, directory)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_are_ones_that_exist(page: Path) -> None:
    """Every `saga` and `saga-worker` line of a console block is one that the command takes."""
    for block in of_page(page):
        if block.language != "console":
            continue
        lines = [command for command, _ in sessions(block)]
        assert lines, f"{name_of(page)}:{block.line}: a console block shows commands after '$ '"
        for line in lines:
            words = list(
                takewhile(lambda word: word not in SHELL, shlex.split(line, comments=True))
            )
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            command = COMMANDS.get(words[0]) if words else None
            if command is None:
                continue
            try:
                parse(command, words[0], words[1:])
            except click.ClickException as error:
                pytest.fail(f"{name_of(page)}:{block.line}: {line}\n{error.format_message()}")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_blocks_are_of_known_kinds_and_none_is_left_out_without_a_reason(page: Path) -> None:
    for block in of_page(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: unknown language {block.language!r}"
        assert (
            block.mark in {"", "alone", "run"}
            or saved_as(block)
            or (block.mark.startswith("not run: ") and len(block.mark) > len("not run: ") + 10)
        ), f"{where}: unknown mark {block.mark!r}"
    source = page.read_text(encoding="utf-8")
    hidden = re.findall(r"^[ \t]+```python", source, re.MULTILINE)
    assert not hidden, f"{name_of(page)}: indented blocks of Python are not found by this test"


def test_a_program_that_prints_something_else_is_found(tmp_path: Path) -> None:
    program = blocks("```python\nprint(1)\n```\n\n```text\n2\n```\n")[:1]
    with pytest.raises(AssertionError, match="prints something else"):
        check_program(CHECKOUT / "README.md", program, tmp_path)


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(click.ClickException):
        parse(saga, "saga", ["list", "--colour"])
    with pytest.raises(click.ClickException):
        parse(saga, "saga", ["forget"])
    parse(saga, "saga", ["dead-letters", "replay", "3", "--yes"])
