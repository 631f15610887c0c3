"""How far everything is, in numbers: what the demo shows while it runs."""

from collections import Counter
from collections.abc import Mapping

import msgspec
from sqlalchemy import Table, func, select

from examples.batch_import.contexts import tables_of
from examples.batch_import.reading import reading, table_named
from sagacity.backends.sql.tables import outbox, saga


class Figures(msgspec.Struct, frozen=True):
    """Counts by state, as of one look at each database."""

    batches: dict[str, tuple[int, int, str]]
    """Batch -> records applied so far, records in all, state."""
    optins: Counter[str]
    orders: Counter[str]
    """Orders that ask for accounts, by what has become of that."""
    holds: dict[str, Counter[str]]
    """System -> orders' holds on accounts, by state."""
    sagas: dict[str, Counter[str]]
    """Saga -> instances, by state."""
    messages: int
    """Messages that all services have sent."""


async def figures(stores: Mapping[str, str]) -> Figures:
    """Look at every database once."""
    batch, order = _table("importing", "batch"), _table("importing", "order")
    optin, requirement = _table("authentication", "optin"), _table("accounts", "requirement")
    batches: dict[str, tuple[int, int, str]] = {}
    holds: dict[str, Counter[str]] = {}
    sagas: dict[str, Counter[str]] = {}
    optins, orders = Counter[str](), Counter[str]()
    messages = 0
    for service, store in stores.items():
        async with reading(store) as connection:
            messages += await connection.scalar(select(func.count()).select_from(outbox)) or 0
            by_state = select(saga.c.saga_type, saga.c.state, saga.c.status, func.count()).group_by(
                saga.c.saga_type, saga.c.state, saga.c.status
            )
            for saga_type, state, status, count in await connection.execute(by_state):
                shown = state if status in {"running", "completed"} else f"{state} ({status})"
                sagas.setdefault(saga_type, Counter())[shown] += count
            match service:
                case "importing":
                    for row in await connection.execute(select(batch)):
                        done = row.applied + row.stale + row.quarantined
                        batches[row.id] = (done, row.records, row.state)
                    asking = order.c.accounts_state != "none"
                    for state, count in await connection.execute(
                        select(order.c.accounts_state, func.count())
                        .where(asking)
                        .group_by(order.c.accounts_state)
                    ):
                        orders[state] = count
                case "authentication":
                    for state, count in await connection.execute(
                        select(optin.c.state, func.count()).group_by(optin.c.state)
                    ):
                        optins[state] = count
                case _:
                    for system, state, count in await connection.execute(
                        select(requirement.c.system, requirement.c.state, func.count()).group_by(
                            requirement.c.system, requirement.c.state
                        )
                    ):
                        holds.setdefault(system, Counter())[state] = count
    return Figures(batches, optins, orders, holds, sagas, messages)


def _table(service: str, name: str) -> Table:
    return table_named(tables_of(service), service, name)
