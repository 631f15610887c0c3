"""What tests of sagas, buses and stores are made of."""

from sagacity.testing.clock import VirtualClock
from sagacity.testing.inline import Inline, Seen

__all__ = ["Inline", "Seen", "VirtualClock"]
