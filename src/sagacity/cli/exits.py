"""What the exit status of a command says."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["MEANINGS", "Exit"]


class Exit(IntEnum):
    """Exit status of `saga-worker` and `saga`."""

    DONE = 0
    FAILED = 1
    WRONG = 2
    SCHEMA = 3
    CUT_SHORT = 4
    UNREACHABLE = 5


MEANINGS: Final = {
    Exit.DONE: "Done; a worker was told to stop and finished what it had begun.",
    Exit.FAILED: (
        "An unexpected error, with its traceback in the log. From `saga`: what was asked for is not "
        "there or could not be done, or `saga counts` found something that needs an operator."
    ),
    Exit.WRONG: (
        "A flag, a variable, a URL or the service is wrong, or an extra is missing. "
        "Starting again does not help."
    ),
    Exit.SCHEMA: "The tables are missing, older or newer than the code: see `saga migrate`.",
    Exit.CUT_SHORT: (
        "A second signal or the shutdown time-out ended the worker before it had finished. "
        "Nothing is lost: what was not acknowledged is delivered again."
    ),
    Exit.UNREACHABLE: ("`saga` could not reach the store. A worker never ends for this, it waits."),
}
