"""Where the services find what is around them: variables named `BATCH_IMPORT_*`.

Whoever starts the processes sets them (`program.py` does); each service reads only its own part.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import msgspec

SMTP: Final = "BATCH_IMPORT_SMTP"
CONFIRM_URL: Final = "BATCH_IMPORT_CONFIRM_URL"
OPT_IN_EXPIRES_S: Final = "BATCH_IMPORT_OPT_IN_EXPIRES_S"
OPT_IN_REMINDER_S: Final = "BATCH_IMPORT_OPT_IN_REMINDER_S"
SECRET: Final = "BATCH_IMPORT_SECRET"  # the variable's name
REMOTE_TIMEOUT_S: Final = "BATCH_IMPORT_REMOTE_TIMEOUT_S"


def remote_url(system: str) -> str:
    """The variable that says where a remote system is."""
    return f"BATCH_IMPORT_{system.upper()}_URL"


class MissingVariable(Exception):
    """A service was started without being told where something is."""


class MailSurroundings(msgspec.Struct, frozen=True):
    """What the authentication service needs."""

    smtp_host: str
    smtp_port: int
    confirm_url: str
    """Links are this, a slash, and the token."""
    secret: str
    """Tokens are derived from it, so that the same opt-in cycle always has the same one."""
    expires: timedelta
    reminder: timedelta | None
    """None sends no reminder."""


class RemoteSurroundings(msgspec.Struct, frozen=True):
    """What the accounts service needs."""

    urls: dict[str, str]
    timeout_s: float


def mail_surroundings(environment: Mapping[str, str] | None = None) -> MailSurroundings:
    """Read the authentication service's part; raises MissingVariable."""
    given = os.environ if environment is None else environment
    host, _, port = _needed(given, SMTP).rpartition(":")
    reminder = float(given.get(OPT_IN_REMINDER_S) or 0)
    return MailSurroundings(
        smtp_host=host,
        smtp_port=int(port),
        confirm_url=_needed(given, CONFIRM_URL),
        secret=_needed(given, SECRET),
        expires=timedelta(seconds=float(given.get(OPT_IN_EXPIRES_S) or 14 * 86_400)),
        reminder=timedelta(seconds=reminder) if reminder else None,
    )


def remote_surroundings(
    systems: tuple[str, ...], environment: Mapping[str, str] | None = None
) -> RemoteSurroundings:
    """Read the accounts service's part; raises MissingVariable."""
    given = os.environ if environment is None else environment
    return RemoteSurroundings(
        urls={system: _needed(given, remote_url(system)) for system in systems},
        timeout_s=float(given.get(REMOTE_TIMEOUT_S) or 10),
    )


def _needed(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise MissingVariable(f"{name} is not set; expected it from whoever starts the service")
    return value
