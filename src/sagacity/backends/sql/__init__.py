"""Store on SQLite (aiosqlite) and PostgreSQL (asyncpg, psycopg 3), with SQLAlchemy Core."""
