"""Suites that a bus or a store must pass before anyone trusts it; for pytest."""

from __future__ import annotations

import pytest

# The suites explain a failed assertion only if pytest has rewritten them.
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "bus",
            "marks",
            "operators",
            "optimistic",
            "outboxes",
            "tasks",
            "transactions",
        )
    )
)
