"""Store on SQLite (aiosqlite) and PostgreSQL (asyncpg, psycopg 3), with SQLAlchemy Core."""

from __future__ import annotations

from sagacity.backends.sql.clock import DatabaseClock
from sagacity.backends.sql.store import SqlStore
from sagacity.backends.sql.tables import metadata

__all__ = ["DatabaseClock", "SqlStore", "metadata"]
