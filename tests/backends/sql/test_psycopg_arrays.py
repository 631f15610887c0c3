"""Arrays in PostgreSQL's binary form, as we write it for psycopg: every value comes back as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import ARRAY, BigInteger, Boolean, Integer, LargeBinary, Text, bindparam, select
from sqlalchemy.types import TypeEngine

from sagacity.backends.sql import SqlStore
from sagacity.backends.sql.database import OpenTransaction
from sagacity.core.errors import DataRefused
from sagacity.testing.clock import VirtualClock

pytestmark = pytest.mark.asyncio


async def came_back(url: str, type_: TypeEngine[Any], values: Sequence[Any]) -> Any:
    store = SqlStore(url, clock=VirtualClock())
    try:
        statement = select(bindparam("values", type_=ARRAY(type_)))
        async with OpenTransaction(store._database, "echo", read_only=True) as opened:
            rows = await opened.run("echo", lambda on: on.read(statement, {"values": values}))
            return rows[0][0]
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (LargeBinary(), [b"", b"\x00\xff", b"x" * 70_000, None]),
        (Text(), ["", "Ünïcödé 🚲", None, "{a,b}", '"']),
        (BigInteger(), [0, -1, 2**63 - 1, -(2**63), None]),
        (Integer(), [0, -1, 2**31 - 1, -(2**31), None]),
        (Boolean(), [True, False, None]),
        (BigInteger(), []),
        (Text(), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TypeEngine) else str(len(value)),
)
async def test_values_come_back(
    psycopg_url: str, type_: TypeEngine[Any], values: list[Any]
) -> None:
    assert await came_back(psycopg_url, type_, values) == values


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (BigInteger(), 2**63),
        (Integer(), 2**31),
        (Text(), "lone \ud800 surrogate"),
        (Text(), "nul \x00 in text"),
    ],
    ids=["bigint", "integer", "surrogate", "nul"],
)
async def test_a_value_that_does_not_fit_is_refused(
    psycopg_url: str, type_: TypeEngine[Any], value: Any
) -> None:
    with pytest.raises(DataRefused):
        await came_back(psycopg_url, type_, [value])
