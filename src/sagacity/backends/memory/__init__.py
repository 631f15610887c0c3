"""A bus and a store in this process: for tests, simulation, and services without servers."""

from sagacity.backends.memory.bus import MemoryBus, MemorySubscription
from sagacity.backends.memory.clock import SystemClock
from sagacity.backends.memory.store import MemoryStore, MemoryTransaction

__all__ = ["MemoryBus", "MemoryStore", "MemorySubscription", "MemoryTransaction", "SystemClock"]
