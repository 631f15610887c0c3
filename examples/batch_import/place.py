"""Where a running program is: written by whoever starts it, read by every other command line."""

from pathlib import Path
from typing import Final

import msgspec

from examples.batch_import.checking import Evidence

FILE: Final = "program.json"


class Place(msgspec.Struct, frozen=True):
    """The addresses of one program."""

    stores: dict[str, str]
    bus: str
    prefix: str
    ledgers: dict[str, str]
    mails: str
    confirm_url: str

    @property
    def evidence(self) -> Evidence:
        """Where `check` finds what it compares."""
        ledgers = {system: Path(path) for system, path in self.ledgers.items()}
        return Evidence(stores=self.stores, ledgers=ledgers, mails=Path(self.mails))

    def write(self, directory: Path) -> None:
        """Leave it in the program's directory; only the owner can read it, for URLs hold secrets."""
        path = directory / FILE
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))

    @classmethod
    def read(cls, directory: Path) -> "Place":
        """Raises FileNotFoundError where no program was started."""
        return msgspec.json.decode((directory / FILE).read_bytes(), type=cls)
