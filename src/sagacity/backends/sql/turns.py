"""SQLite lets one connection write at a time: the writers of one process take turns.

Without it they would meet at the lock of the file, which a waiting connection only looks at now and
then, and in no order. Other processes are still waited for there.
"""

from __future__ import annotations

import anyio

from sagacity.core.errors import Unavailable


class Turns:
    """The queue of one process for one database, first come, first served."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: how long one writer waits for the others."""
        self.free = anyio.Semaphore(1)
        self.patience_s = patience_s


class Turn:
    """One writer's place in the queue. `give_up` is safe at any time, and must come in the end."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._taken = False

    async def take(self) -> None:
        """Waits until no other writer is at work. Does nothing where the turn is taken already.

        Raises Unavailable when that takes too long.
        """
        if self._taken:
            return
        with anyio.move_on_after(self._turns.patience_s):
            await self._turns.free.acquire()
            self._taken = True
            return
        raise Unavailable(
            f"begin: expected the database to be free to write within {self._turns.patience_s:g} s, "
            "but another transaction of this process holds it; keep transactions short, and begin none "
            "inside another"
        )

    def give_up(self) -> None:
        """Lets the next writer begin."""
        if self._taken:
            self._taken = False
            self._turns.free.release()
