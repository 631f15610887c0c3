from __future__ import annotations

from tests.cli.reference import pages


def test_the_reference_pages_are_what_the_programs_say() -> None:
    for path, text in pages().items():
        assert path.exists(), f"{path.name} is missing; run: python -m tests.cli.reference"
        assert path.read_text() == text, f"{path.name} is old; run: python -m tests.cli.reference"
