"""Settings of a Redis server under which messages can be lost."""

from __future__ import annotations

from typing import Any

from sagacity.backends.redis.client import Client
from sagacity.backends.redis.connection import Connector

VERSION_MIN = (6, 2)


async def server_info(client: Client, connector: Connector) -> dict[str, dict[str, Any]]:
    """What INFO says, by the name to show for the server; of each primary in a cluster."""
    if not connector.cluster:
        return {connector.name: await client.execute_command("INFO")}
    info = await client.execute_command("INFO", target_nodes="primaries")
    if "redis_version" in info:  # a cluster of one
        return {connector.name: info}
    return {f"{connector.name} ({node})": facts for node, facts in info.items()}


def unsafe_lines(name: str, facts: dict[str, Any]) -> list[str]:
    """One line for each unsafe setting: what, where, expected, got, what to do."""
    lines: list[str] = []
    version = str(facts.get("redis_version", "0"))
    if _version(version) < VERSION_MIN:
        lines.append(
            f"Redis at {name} is version {version}; expected {'.'.join(map(str, VERSION_MIN))} or newer "
            "(XAUTOCLAIM); upgrade the server"
        )
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        lines.append(
            f"Redis at {name} has maxmemory-policy {policy}; expected noeviction, otherwise it deletes "
            "streams with unread messages when memory ends; set maxmemory-policy noeviction"
        )
    if not int(facts.get("aof_enabled", 0)):
        lines.append(
            f"Redis at {name} has appendonly no; expected yes, otherwise a restart loses messages "
            "that others published (ours are published again); set appendonly yes"
        )
    return lines


def _version(text: str) -> tuple[int, int]:
    parts = [int(part) if part.isdigit() else 0 for part in (*text.split("."), "0", "0")[:2]]
    return parts[0], parts[1]
