"""What a long life costs: an idle minute, a million finished instances, a million messages.

    python -m benchmarks.endurance [--instances 1000000] [--messages 1000000] [--only idle,growth,memory]

- idle: transactions and Redis commands of a worker that has nothing to do, for a minute;
- growth: steps a second beside a million finished instances, their history, and a million inbox rows,
  against those on an empty store, in turns;
- memory: the resident memory of one worker, over a million messages.

Writes `benchmarks/results/endurance.json`, and what it says into `docs/explanation/performance.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from sqlalchemy import make_url

from benchmarks.cases import Case
from benchmarks.load import Connection
from benchmarks.measuring import load
from benchmarks.servers import Place, Servers
from benchmarks.systems import Running, sagacity, started

RESULTS = Path(__file__).with_name("results") / "endurance.json"
PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "performance.md"
BEGIN, END = "<!-- a long life -->\n", "<!-- end of a long life -->"
IDLE_S = 60.0
ROUNDS = 5
SAGAS_A_ROUND = 3000
BUSY = Case("happy", 1000)
LONG_AGO = 1_600_000_000_000_000

# What a finished import leaves behind, with values of the same sizes, and ids in no order.
_PARTS = {
    "sagacity_saga": (
        (
            "saga_type, saga_key, uid, version, status, state, schema_version, data, ledger, started_at,"
            " updated_at"
        ),
        "'ImportUser', {key}, {uid}, 3, 'completed', 'done', 1, {data}, {ledger}, {at}, {at}",
    ),
    "sagacity_inbox": (
        "consumer, message_id, outcome, at",
        "{consumer}, {uid}, 'handled', {at}",
    ),
    "sagacity_transition": (
        (
            "uid, version, saga_type, saga_key, at, message_id, message_type, handler, state_from,"
            " state_to, status, correlation_id, effects, entry"
        ),
        (
            "{uid}, 3, 'ImportUser', {key}, {at}, {uid}, 'bench.AccountGenerated', 'generated',"
            " 'generating', 'done', 'completed', {key}, {ledger}, {data}"
        ),
    ),
}
_POSTGRESQL = {
    "key": "('old-' || n)::bytea",
    "uid": "md5(n::text)::bytea",
    "consumer": "'ImportUser'::bytea",
    "data": "convert_to(repeat('x', 240), 'UTF8')",
    "ledger": "convert_to(repeat('y', 120), 'UTF8')",
    "at": f"{LONG_AGO} + n",
}
_SQLITE = {
    "key": "CAST('old-' || n AS BLOB)",
    "uid": "CAST(hex(randomblob(16)) AS BLOB)",
    "consumer": "CAST('ImportUser' AS BLOB)",
    "data": "zeroblob(240)",
    "ledger": "zeroblob(120)",
    "at": f"{LONG_AGO} + n",
}


def fill(place: Place, instances: int) -> None:
    """Adds finished instances with one inbox row and one line of history each."""
    if place.store.startswith("sqlite"):
        numbers = f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {instances})"
        with sqlite3.connect(make_url(place.store).database or "") as connection:
            for table, (columns, values) in _PARTS.items():
                connection.execute(
                    f"{numbers} INSERT INTO {table} ({columns}) SELECT {values.format(**_SQLITE)} FROM numbers"
                )
        connection.close()
        return
    asyncio.run(_fill_postgresql(place, instances))


async def _fill_postgresql(place: Place, instances: int) -> None:
    connection = await asyncpg.connect(place.store)
    try:
        for table, (columns, values) in _PARTS.items():
            await connection.execute(
                f"INSERT INTO {table} ({columns}) SELECT {values.format(**_POSTGRESQL)} "
                f"FROM generate_series(1, {instances}) AS numbers(n)"
            )
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


# ------------------------------------------------------------------------------------------ the parts


def idle(servers: Servers) -> dict[str, Any]:
    """What a worker asks of its servers in a minute without messages."""
    with servers.place("postgresql", "idle") as place, started(sagacity(), place):
        redis = Connection(place.redis)
        time.sleep(3.0)
        before = _asked(place, redis)
        time.sleep(IDLE_S)
        after = _asked(place, redis)
        redis.close()
    return {
        "seconds": IDLE_S,
        "postgresql_transactions": after[0] - before[0] - 1,
        "redis_commands": after[1] - before[1] - 1,
    }


def _asked(place: Place, redis: Connection) -> tuple[int, int]:
    async def transactions() -> int:
        connection = await asyncpg.connect(place.store)
        try:
            await connection.execute("SELECT pg_stat_clear_snapshot()")
            return int(
                await connection.fetchval(
                    "SELECT xact_commit + xact_rollback FROM pg_stat_database"
                    " WHERE datname = current_database()"
                )
            )
        finally:
            await connection.close()

    [stats] = redis(("INFO", "stats"))
    commands = next(
        line for line in stats.decode().splitlines() if line.startswith("total_commands_processed")
    )
    return asyncio.run(transactions()), int(commands.partition(":")[2])


def growth(servers: Servers, store: str, instances: int) -> dict[str, Any]:
    """Steps a second on an empty store and on a full one, in turns, and the median of their ratios."""
    with (
        servers.place(store, "empty") as empty,
        servers.place(store, "full") as full,
        started(sagacity(), empty) as fresh,
        started(sagacity(), full) as aged,
    ):
        fill(full, instances)
        load(fresh, BUSY, 500)
        load(aged, BUSY, 500)
        pairs: list[tuple[float, float]] = []
        for number in range(ROUNDS):
            pair = [fresh, aged] if number % 2 else [aged, fresh]
            rates = {id(one): load(one, BUSY, SAGAS_A_ROUND)["steps_per_s"] for one in pair}
            pairs.append((rates[id(fresh)], rates[id(aged)]))
            print(f"  {store}: {pairs[-1][0]:.0f} empty, {pairs[-1][1]:.0f} full", flush=True)
    return {
        "store": store,
        "instances": instances,
        "rounds": pairs,
        "steps_per_s_empty": statistics.median(a for a, _ in pairs),
        "steps_per_s_full": statistics.median(b for _, b in pairs),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
    }


def memory(servers: Servers, messages: int, parts: int = 10) -> dict[str, Any]:
    """Resident memory of a worker after each tenth of the messages."""
    with servers.place("postgresql", "memory") as place, started(sagacity(), place) as running:
        load(running, BUSY, 1000)
        seen = [(0, _rss_mb(running))]
        for part in range(parts):
            load(running, BUSY, messages // 3 // parts)
            _forget_streams(place)
            seen.append((messages * (part + 1) // parts, _rss_mb(running)))
            print(f"  {seen[-1][0]} messages: {seen[-1][1]:.1f} MB", flush=True)
    return {"messages": messages, "rss_mb": seen}


def _forget_streams(place: Place) -> None:
    """The streams are not what is measured, and Redis keeps them in memory."""
    redis = Connection(place.redis)
    for topic in ("imports", "auth", "accounts"):
        redis(("XTRIM", f"bench:{topic}", "MAXLEN", 0))
    redis.close()


def _rss_mb(running: Running) -> float:
    total = 0
    for process in running.tree():
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return round(total / 1e6, 1)


# ------------------------------------------------------------------------------------------- the page


def told(found: dict[str, Any]) -> str:
    """The figures in words; those that were not measured are left out."""
    lines = [f"Measured on {found['date'][:10]}.", ""]
    if idle := found.get("idle"):
        lines.append(
            f"- **An idle minute** of one worker is {_large(idle['postgresql_transactions'])} transactions on PostgreSQL and "
            f"{_large(idle['redis_commands'])} commands on Redis."
        )
    for row in found.get("growth", ()):
        names = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
        lines.append(
            f"- **{_large(row['instances'])} finished instances**, as many inbox rows and lines of history, on "
            f"{names[row['store']]}: {_large(row['steps_per_s_full'])} steps/s, on an empty store "
            f"{_large(row['steps_per_s_empty'])}; the median of {len(row['rounds'])} ratios in turns is {row['ratio']:.2f}."
        )
    if memory := found.get("memory"):
        first, *rest = (megabytes for _, megabytes in memory["rss_mb"])
        lines.append(
            f"- **{_large(memory['messages'])} messages** through one worker: {first:.0f} MB of resident memory before, "
            f"{min(rest):.0f} to {max(rest):.0f} MB after each tenth of them."
        )
    return "\n".join(lines) + "\n"


def _large(number: float) -> str:
    return f"{number:,.0f}"


def page_with(source: str, found: dict[str, Any]) -> str:
    """The page with these figures in their place."""
    head, _, rest = source.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{told(found)}\n{END}{tail}"


def main() -> None:
    """Runs the parts, prints and keeps their figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=1_000_000)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--only", default="idle,growth,memory")
    asked = parser.parse_args()
    parts = asked.only.split(",")
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["date"] = dt.datetime.now(dt.UTC).isoformat(timespec="minutes")
    with Servers() as servers:
        if "idle" in parts:
            found["idle"] = idle(servers)
            print(found["idle"], flush=True)
        if "growth" in parts:
            found["growth"] = [
                growth(servers, store, asked.instances) for store in ("postgresql", "sqlite")
            ]
            for row in found["growth"]:
                print({key: value for key, value in row.items() if key != "rounds"}, flush=True)
        if "memory" in parts:
            found["memory"] = memory(servers, asked.messages)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    PAGE.write_text(page_with(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
