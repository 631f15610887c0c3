"""The clock of the memory backends: there is no database whose clock could be followed."""

from __future__ import annotations

import time


class SystemClock:
    """The time of this process: monotonic, set once from the system's clock."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        """Microseconds since 1970, UTC. Never goes back."""
        return (time.monotonic_ns() + self._offset_ns) // 1000
