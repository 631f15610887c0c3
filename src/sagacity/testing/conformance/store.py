"""The suite every store must pass: each promise of the store ports in `sagacity.ports`.

Subclass `StoreConformance` in a test module, give it a fixture ``database`` that returns a
`StoreDatabase`, and mark the class for your asynchronous test plugin::

    @pytest.mark.asyncio
    class TestMyStore(StoreConformance):
        @pytest.fixture
        def database(self) -> MyDatabase: ...
"""

from __future__ import annotations

from sagacity.testing.conformance.marks import MarkSuite
from sagacity.testing.conformance.operators import OperatorSuite
from sagacity.testing.conformance.optimistic import OptimisticSuite
from sagacity.testing.conformance.outboxes import OutboxSuite
from sagacity.testing.conformance.stores import FullStore, StoreDatabase, Workers, workers
from sagacity.testing.conformance.tasks import TaskSuite
from sagacity.testing.conformance.transactions import TransactionSuite

__all__ = ["FullStore", "StoreConformance", "StoreDatabase", "Workers", "workers"]


class StoreConformance(
    TransactionSuite, OptimisticSuite, OutboxSuite, TaskSuite, OperatorSuite, MarkSuite
):
    """All promises of `Store`, `OutboxStore`, `TaskStore`, `RetentionStore`, `Inspector`, `MarkStore`."""
