"""Run the Python blocks of a Markdown page as one program: ``readme_program.py README.md``.

A block ``text`` directly below a Python block is what the program prints there. Standard library only:
this runs in an environment that has nothing but the wheel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def program_of(page: str) -> tuple[str, str]:
    """The Python blocks of `page` joined, and the output that it promises."""
    sources: list[str] = []
    promised: list[str] = []
    end_of_python = -1
    for block in BLOCK.finditer(page):
        language, text = block.groups()
        if language == "python":
            sources.append(text)
            end_of_python = block.end()
        elif language == "text" and not page[end_of_python : block.start()].strip():
            promised.append(text)
    return "\n\n".join(sources), "".join(promised)


def main(path: Path) -> int:
    source, promised = program_of(path.read_text(encoding="utf-8"))
    if not source:
        print(f"{path} has no block of Python to run", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "readme.py"
        program.write_text(source, encoding="utf-8")
        run = subprocess.run(
            [sys.executable, "-I", str(program)],
            check=False,
            capture_output=True,
            text=True,
            cwd=directory,
            timeout=120,
        )
    if run.returncode != 0:
        print(f"{path}: the program failed\n{run.stdout}{run.stderr}", file=sys.stderr)
        return run.returncode
    if promised and run.stdout != promised:
        print(
            f"{path}: the program prints something else\nexpected:\n{promised}\ngot:\n{run.stdout}",
            file=sys.stderr,
        )
        return 1
    print(f"{path.name}: the program ran ({len(source.splitlines())} lines)")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
