"""What one step costs the worker's pure parts: sort, put into a batch, fold. No clock, no server.

python -m benchmarks.core [--steps 30000]        microseconds of CPU per step, median of five
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

from benchmarks.imports import service
from sagacity.core.batch import plan_batch
from sagacity.core.decide import Sender
from sagacity.core.delivery import Delivery, Envelope
from sagacity.core.instance import Instance
from sagacity.core.plan import Known, Loaded, Plan
from sagacity.worker.intake import Intake
from sagacity.worker.sorting import Batch, sorted_input

BATCH = 300
DOCUMENT = b"x" * 200
_ANSWERS = {
    "bench.AuthenticateUser": "bench.UserAuthenticated",
    "bench.GenerateAccount": "bench.AccountGenerated",
}


class Core:
    """The import saga through `plan_batch`, its rows kept in a dictionary."""

    def __init__(self) -> None:
        self.catalog = service.catalog(Sender("imports"))
        self.intake = Intake()
        self.instances: dict[tuple[str, str], Instance] = {}
        self.steps = 0

    def settle(self, envelopes: list[Envelope]) -> Plan:
        """One batch, as the worker runs it between its reads and its writes."""
        now = 1_700_000_000_000_000 + self.steps
        self.intake.add(
            sorted_input(service, self.catalog, Delivery(topic=e.topic, entry_id=e.id, envelope=e))
            for e in envelopes
        )
        taken = self.intake.take(BATCH)
        assert taken is not None
        batch = Batch(service, taken.inputs, {})
        arrivals = batch.arrivals({})
        found = {
            place: self.instances[place]
            for arrival in arrivals
            if (place := (arrival.saga_type, arrival.saga_key)) in self.instances
        }
        loaded = Loaded(instances=found, busy=set())
        known = Known(seen=set(), timeouts=set(), parked=set())
        assert {guard for arrival in arrivals for guard in arrival.guards}
        plan, _ = plan_batch(self.catalog, arrivals, loaded, known, now)
        for instance in plan.saga_inserts:
            self.instances[instance.type, instance.key] = instance
        for instance, _ in plan.saga_updates:
            self.instances[instance.type, instance.key] = instance
        self.intake.done(taken)
        self.steps += len(envelopes)
        return plan

    def run(self, sagas: int) -> None:
        """`sagas` from the first event to the last, in batches of one kind of event each."""
        for batch in _batches(sagas):
            while batch:
                batch = [_answer(row.envelope) for row in self.settle(batch).outbox]  # noqa: PLW2901


def _batches(sagas: int) -> Iterator[list[Envelope]]:
    for start in range(0, sagas, BATCH):
        yield [_request(f"import-{n}") for n in range(start, min(start + BATCH, sagas))]


def _request(key: str) -> Envelope:
    body = b'{"import_id":"%s","document":"%s"}' % (key.encode(), DOCUMENT)
    return Envelope(
        id=f"request:{key}",
        type="bench.ImportRequested",
        topic="imports",
        body=body,
        correlation_id=key,
    )


def _answer(command: Envelope) -> Envelope:
    body = b'{"import_id":"%s","document":"%s"}' % (command.saga_key.encode(), DOCUMENT)
    return Envelope(
        id=f"reply:{command.id}",
        type=_ANSWERS[command.type],
        topic="imports",
        body=body,
        correlation_id=command.correlation_id,
        causation_id=command.id,
        in_reply_to=command.id,
        saga_type=command.saga_type,
        saga_key=command.saga_key,
        saga_uid=command.saga_uid,
    )


def main() -> None:
    """Prints the cost of a step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30_000)
    steps = parser.parse_args().steps
    costs = []
    for _ in range(5):
        core = Core()
        began = time.process_time()
        core.run(steps // 3)
        costs.append((time.process_time() - began) / core.steps * 1e6)
    print(f"{statistics.median(costs):.1f} us a step (min {min(costs):.1f}, max {max(costs):.1f})")


if __name__ == "__main__":
    main()
