"""What the drivers raise, translated once.

The three drivers report the same trouble in different classes; PostgreSQL's SQLSTATE and SQLite's
extended result code say which it is. Only the first line of a driver's text is kept: later lines and
SQLAlchemy's own text would show the values of the statement.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from sagacity.core.errors import (
    Conflict,
    DataRefused,
    DecodeError,
    SagacityError,
    SchemaError,
    StoreError,
    Unavailable,
)

MIGRATE = "run: saga migrate --store URL"

_CONFLICT_STATES = {
    "40001",  # serialization failure
    "40P01",  # deadlock
    "55P03",  # lock not available in time
    "23505",  # unique: somebody else wrote the row first
}
_UNAVAILABLE_STATES = {
    "25006",  # read-only: a standby, or the old side of a failover
    "25P03",  # idle in transaction for too long
    "25P04",  # transaction for too long
    "57014",  # statement_timeout
    "3D000",  # no such database (yet)
}
_UNAVAILABLE_CLASSES = ("08", "28", "53", "57", "58", "XX")
_DATA_CLASSES = ("22", "23", "54")
_SCHEMA_STATES = {
    "42P01",  # no such table
    "42703",  # no such column
    "42501",  # not allowed
    "3F000",  # no such schema
}

_SQLITE_UNAVAILABLE = {
    5,  # BUSY
    6,  # LOCKED
    7,  # NOMEM
    8,  # READONLY
    10,  # IOERR
    13,  # FULL
    14,  # CANTOPEN
    15,  # PROTOCOL
}
_SQLITE_DATA = {18, 20}  # TOOBIG, MISMATCH
_SQLITE_UNIQUE = {1555, 2067, 2579}  # CONSTRAINT_PRIMARYKEY, _UNIQUE, _ROWID
_SQLITE_CONSTRAINT = 19


def translated(error: Exception, what: str) -> Exception:
    """The framework's error for one that a driver, the pool or a codec raised while doing `what`.

    An error that is ours already, or that no database can have caused, comes back as it is.
    """
    if isinstance(error, DecodeError):
        return StoreError(f"{what}: a stored row cannot be read: {error}")
    if isinstance(error, SagacityError):
        return error
    if isinstance(error, UnicodeEncodeError):
        return DataRefused(f"{what}: expected text that UTF-8 can encode, got {error.object!r:.80}")
    if isinstance(error, OverflowError):
        return DataRefused(f"{what}: expected numbers of at most 64 bits: {error}")
    if isinstance(error, DBAPIError):
        return _from_driver(error.orig, what)
    if isinstance(error, PoolTimeout):
        return Unavailable(f"{what}: all connections of the pool are in use: {_line(error)}")
    if isinstance(error, OSError | asyncio.TimeoutError | EOFError):
        return Unavailable(f"{what}: the database cannot be reached: {_line(error)}")
    if isinstance(error, InvalidRequestError | InterfaceError):
        return StoreError(f"{what}: {_line(error)}")
    state = _sqlstate(error)
    if state is not None:  # asyncpg raises its own errors while it connects
        return _from_state(state, what, error)
    if isinstance(error, sqlite3.Error) or _of_driver(error):
        return _from_driver(error, what)
    if isinstance(error, SQLAlchemyError):
        return StoreError(f"{what}: {_line(error)}")
    return error


def lost_to_others(error: Exception) -> bool:
    """True where the database ended the transaction because of others or of its own trouble.

    For errors of the user's own statements: a constraint of the user's is not one of these.
    """
    if isinstance(error, OSError | PoolTimeout) or _of_driver(error):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    state = _sqlstate(error.orig)
    if state is not None:
        return (state in _CONFLICT_STATES and state != "23505") or _is_unavailable(state)
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code is not None and (code & 0xFF) in _SQLITE_UNAVAILABLE


def is_division_by_zero(error: BaseException) -> bool:
    """True where PostgreSQL divided by zero, which one statement of ours does to end itself."""
    return _sqlstate(error) == "22012"


def _from_driver(driver: BaseException | None, what: str) -> StoreError:
    state = _sqlstate(driver)
    if state is not None:
        return _from_state(state, what, driver)
    code = getattr(driver, "sqlite_errorcode", None)
    if code is not None:
        return _from_sqlite(code, what, driver)
    # Without a code the driver never heard from the server, or refused a value by itself.
    name = type(driver).__name__
    if name in {"DataError", "ProgrammingError"} or isinstance(driver, ValueError | TypeError):
        return DataRefused(f"{what}: the driver refuses a value: {_line(driver)}")
    return Unavailable(f"{what}: the database cannot be reached: {_line(driver)}")


def _of_driver(error: BaseException) -> bool:
    """True for an error about the state of a connection that SQLAlchemy did not wrap."""
    return type(error).__module__.partition(".")[0] in {"asyncpg", "psycopg"}


def _sqlstate(error: BaseException | None) -> str | None:
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state if isinstance(state, str) else None


def _is_unavailable(state: str) -> bool:
    return state in _UNAVAILABLE_STATES or state.startswith(_UNAVAILABLE_CLASSES)


def _from_state(state: str, what: str, error: BaseException | None) -> StoreError:
    told = f"{_line(error)} (SQLSTATE {state})"
    if state in _CONFLICT_STATES:
        return Conflict(f"{what}: somebody else was first: {told}")
    if _is_unavailable(state):
        return Unavailable(f"{what}: the database cannot be reached or ended the work: {told}")
    if state.startswith(_DATA_CLASSES):
        return DataRefused(f"{what}: the database refuses a value: {told}")
    if state in _SCHEMA_STATES:
        return SchemaError(f"{what}: the tables are missing or do not fit: {told}; {MIGRATE}")
    return StoreError(f"{what}: {told}")


def _from_sqlite(code: int, what: str, error: BaseException | None) -> StoreError:
    told = f"{_line(error)} ({getattr(error, 'sqlite_errorname', code)})"
    kind = code & 0xFF
    if code in _SQLITE_UNIQUE:
        return Conflict(f"{what}: somebody else was first: {told}")
    if kind in _SQLITE_UNAVAILABLE:
        return Unavailable(f"{what}: the database is busy or cannot be used now: {told}")
    if kind == _SQLITE_CONSTRAINT or kind in _SQLITE_DATA:
        return DataRefused(f"{what}: the database refuses a value: {told}")
    if "no such table" in told or "no such column" in told or "has no column" in told:
        return SchemaError(f"{what}: the tables are missing or do not fit: {told}; {MIGRATE}")
    return StoreError(f"{what}: {told}")


_PASSWORD = re.compile(
    r"(?P<before>://[^:/@\s]*:)[^@\s]+(?=@)|(?P<name>password=)\S+", re.IGNORECASE
)


def _line(error: BaseException | None) -> str:
    """The first line of an error's text, without passwords."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    # SQLAlchemy's adapters put the driver's class in front: "<class 'asyncpg...'>: text".
    line = re.sub(r"^<class '[^']+'>: ", "", line)
    return _PASSWORD.sub(lambda m: (m["before"] or m["name"] or "") + "***", line)[:500]
