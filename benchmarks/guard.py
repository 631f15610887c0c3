"""The regression guard: instructions per message of the parts of the hot path that are only Python.

Instructions that a processor is told to execute, counted by callgrind, do not depend on what else the
machine does. They do depend on how Python was built, so each count is divided by that of a fixed piece
of Python, run in the same process: the figures are ratios, in "references" per message.

    python -m benchmarks.guard             compare with benchmarks/guard.json; exit status 1 beyond it
    python -m benchmarks.guard --control   the same with a slowed step, which must be found
    python -m benchmarks.guard --update    write benchmarks/guard.json

Needs valgrind on PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.core import Core
from sagacity.codec import from_fields, to_fields
from sagacity.core.definition import Definition, fields_of
from sagacity.core.delivery import Envelope

KEPT = Path(__file__).with_name("guard.json")
MARGIN = 0.08
"""How much more a part may cost than was kept. Two runs of one version differ by less than 1 %."""
MESSAGES = 900
_SWITCHED = ["callgrind_control", "-i"]


class _Record(msgspec.Struct, frozen=True):
    name: str
    numbers: tuple[int, ...]


def reference(times: int) -> None:
    """The measure: calls, dictionaries, records, text and JSON as any Python program has them."""
    encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder(_Record).decode
    found: dict[tuple[str, int], _Record] = {}
    for number in range(times):
        record = _Record(f"record {number}", (number, number + 1))
        for place in range(10):
            found[record.name, place] = msgspec.structs.replace(record, name=record.name[::-1])
        assert decode(encode(found[record.name, 0])).numbers == record.numbers


def core(messages: int) -> None:
    """Sorted, put into a batch, decided, folded into a plan: see `benchmarks.core`."""
    Core().run(messages // 3)


def codec(messages: int) -> None:
    """From the fields of a stream entry to an envelope, and back."""
    sent = Envelope(
        id="0123456789abcdef0123456789abcdef",
        type="bench.UserAuthenticated",
        topic="imports",
        body=b'{"import_id":"import-1","document":"%s"}' % (b"x" * 200),
        time=1_700_000_000_000_000,
        source="imports",
        correlation_id="import-1",
        causation_id="fedcba9876543210fedcba9876543210",
        in_reply_to="fedcba9876543210fedcba9876543210",
        saga_type="ImportUser",
        saga_key="import-1",
        saga_uid="00112233445566778899aabbccddeeff",
        hops=2,
    )
    flat = [_bytes(part) for part in to_fields(sent)]
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    for _ in range(messages):
        to_fields(from_fields("imports", fields))


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


PARTS: dict[str, Callable[[int], None]] = {"core": core, "codec": codec}


def slow_down() -> None:
    """What the guard must find: a mistake this code once made, annotations read for each instance."""
    made = Definition.new

    def slower(self: Definition, key: str) -> object:
        fields_of(self.cls)
        return made(self, key)

    Definition.new = slower  # type: ignore[method-assign,assignment]


# ----------------------------------------------------------------------------------------- counting


def count(part: str, *, slowed: bool) -> float:
    """References per message of one part, from callgrind. Raises RuntimeError where it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = [
            *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-instr=no"),
            *("--combine-dumps=yes", f"--callgrind-out-file={out}"),
            *(sys.executable, "-m", "benchmarks.guard", "--child", part),
            *(["--control"] if slowed else []),
        ]
        ran = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            # The same hash seed, so that dictionaries are laid out alike in every run.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if ran.returncode != 0:
            raise RuntimeError(f"counting {part} failed ({ran.returncode}):\n{ran.stderr[-2000:]}")
        measured, unit = totals(out.read_text())
    return measured / unit


def totals(text: str) -> list[int]:
    """The instructions of each dump in a callgrind file, in order, without the empty one at the end."""
    found = re.findall(r"^totals: (\d+)", text, re.MULTILINE)
    return [int(total) for total in found if total != "0"]


def child(part: str, *, slowed: bool) -> None:
    """Runs under callgrind: the part and then the reference, each counted by itself."""
    if slowed:
        slow_down()
    PARTS[part](MESSAGES)  # imports, caches
    reference(MESSAGES)
    for work in (PARTS[part], reference):
        _told("on")
        work(MESSAGES)
        _told("off")
        subprocess.run(
            ["callgrind_control", "-d", str(os.getpid())], check=True, stdout=subprocess.DEVNULL
        )


def _told(switch: str) -> None:
    subprocess.run([*_SWITCHED, switch, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def slower_parts(now: dict[str, float], kept: dict[str, float]) -> list[str]:
    """One line for each part that costs more than it may."""
    return [
        f"{part}: {cost:.2f} references per message, expected at most {kept[part] * (1 + MARGIN):.2f} "
        f"({cost / kept[part] - 1:+.1%} against {kept[part]:.2f})"
        for part, cost in now.items()
        if cost > kept[part] * (1 + MARGIN)
    ]


def main() -> int:
    """Prints each part's cost; 1 where one is beyond its limit, or the control is not found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="keep today's figures")
    parser.add_argument("--control", action="store_true", help="slow the core down; must be found")
    parser.add_argument("--child", choices=sorted(PARTS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, slowed=asked.control)
        return 0
    parts = ["core"] if asked.control else list(PARTS)
    now = {part: round(count(part, slowed=asked.control), 3) for part in parts}
    for part, cost in now.items():
        print(f"{part}: {cost:.2f} references per message")
    if asked.update:
        KEPT.write_text(json.dumps(now, indent=2) + "\n")
        return 0
    slower = slower_parts(now, json.loads(KEPT.read_text()))
    for line in slower:
        print(f"slower: {line}")
    if asked.control:
        print("the slowed step was found" if slower else "the slowed step was NOT found")
        return 0 if slower else 1
    if slower:
        print("Make it as cheap as it was, or keep the new figures with --update and say why.")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
