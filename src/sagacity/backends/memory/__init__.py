"""A bus and a store in this process: for tests, simulation, and services without servers."""

from sagacity.backends.memory.bus import MemoryBus, MemorySubscription
from sagacity.backends.memory.clock import SystemClock

__all__ = ["MemoryBus", "MemorySubscription", "SystemClock"]
