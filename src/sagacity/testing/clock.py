"""Time for tests: it stands still until it is moved."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sagacity.codec import microseconds, moment

__all__ = ["VirtualClock"]

_DEFAULT = datetime(2026, 1, 1, tzinfo=UTC)


class VirtualClock:
    """A clock that only `advance` and `set` move; usable wherever a `Clock` is expected."""

    def __init__(self, start: datetime | int = _DEFAULT) -> None:
        """Begin at `start`: an aware datetime, or microseconds since 1970 in UTC."""
        self._now = _microseconds(start)

    def __repr__(self) -> str:
        return f"VirtualClock({self.moment.isoformat()})"

    def now(self) -> int:
        """Microseconds since 1970, UTC."""
        return self._now

    @property
    def moment(self) -> datetime:
        """The same as an aware datetime."""
        return moment(self._now)

    def advance(self, by: timedelta | float) -> int:
        """Moves on by a timedelta or a number of seconds; returns the new time in microseconds.

        Raises ValueError for going back: that is what `set` is for.
        """
        step = by // timedelta(microseconds=1) if isinstance(by, timedelta) else round(by * 1e6)
        if step < 0:
            raise ValueError(f"clock: expected to advance by zero or more, got {by!r}; use set()")
        self._now += step
        return self._now

    def set(self, to: datetime | int) -> int:
        """Jumps to a moment, back too, as a corrected clock does; returns it in microseconds."""
        self._now = _microseconds(to)
        return self._now


def _microseconds(value: datetime | int) -> int:
    if isinstance(value, int):
        return value
    if value.tzinfo is None:
        raise ValueError(f"clock: expected an aware datetime, got {value!r}; add tzinfo=UTC")
    return microseconds(value)
