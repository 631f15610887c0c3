"""What the janitor does to streams and groups: nothing that somebody may still need goes."""

from __future__ import annotations

from typing import Any

import redis.exceptions as failures

from sagacity.backends.redis.client import Client
from sagacity.backends.redis.connection import reason_of
from sagacity.backends.redis.subscription import forget_consumer


async def trim(client: Client, key: str, retention_us: int) -> int:
    """Removes old entries of a stream that every group has acknowledged; returns how many went.

    The bound is the lowest of: what each group has pending, what it was handed last, and the
    server's time less the retention (protocol.md row 2). A stream without groups is left alone.
    """
    groups = await _info(client, "XINFO GROUPS", key)
    if not groups:
        return 0
    bounds: list[tuple[int, int]] = []
    for group in groups:
        # Read after the group's position: whatever is acknowledged by now was handed out by then.
        pending = await client.execute_command("XPENDING", key, group["name"])
        bounds.append(_number(group["last-delivered-id"]))
        if pending["pending"]:
            bounds.append(_number(pending["min"]))
    seconds, micros = await client.execute_command("TIME")
    oldest_ms = (int(seconds) * 1_000_000 + int(micros) - retention_us) // 1000
    bounds.append((max(0, oldest_ms), 0))
    bound = min(bounds)
    if bound == (0, 0):
        return 0
    gone = 0
    while True:
        # "~" removes whole nodes only and a bounded number of them, so the server stays responsive.
        removed = int(
            await client.execute_command("XTRIM", key, "MINID", "~", f"{bound[0]}-{bound[1]}")
        )
        gone += removed
        if removed == 0:
            return gone


async def forget_consumers(client: Client, key: str, group: str, idle_us: int) -> int:
    """Removes a group's consumers that are idle and have nothing pending; returns how many went."""
    gone = 0
    for consumer in await _info(client, "XINFO CONSUMERS", key, group):
        if not consumer["pending"] and int(consumer["idle"]) * 1000 >= idle_us:
            gone += await forget_consumer(client, key, group, _text(consumer["name"]))
    return gone


async def _info(client: Client, *command: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = await client.execute_command(*command)
    except failures.ResponseError as error:
        reason = reason_of(error)
        if reason.startswith("NOGROUP") or reason.lower().endswith("no such key"):
            return []
        raise
    return rows


def _number(entry_id: object) -> tuple[int, int]:
    milliseconds, _, sequence = _text(entry_id).partition("-")
    return int(milliseconds), int(sequence or 0)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
