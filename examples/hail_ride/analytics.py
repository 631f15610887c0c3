"""Form 2: listens to the whole application, whoever announces. Delete it and nothing else changes."""

from __future__ import annotations

from collections import Counter

from sagacity import Event
from sagacity.listeners import Listeners


class Analytics:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def listen_to(self, application: Listeners) -> None:
        application.add(self.count, "rides.*")

    def count(self, event: Event) -> None:
        self.counts[type(event).__name__] += 1
