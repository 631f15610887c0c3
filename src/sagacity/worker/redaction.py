"""URLs without their secrets, and secrets out of any text.

When in doubt more is hidden than needed: a URL that cannot be understood is not shown at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

__all__ = ["redacted", "scrubbed", "secrets_of"]

_HIDDEN: Final = "***"
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SECRET_PARAMETER: Final = re.compile(
    r"(?i)([?&;][^=&;]*(?:pass|pwd|secret|token|key|auth|cred)[^=&;]*=)[^&;#]*"
)
_SHORTEST_SECRET: Final = 3
"""A shorter one is not searched for in other texts: it would turn up in every word."""


def redacted(url: str) -> str:
    """`url` with password and secret parameters replaced by ``***``; never raises."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url if url == "memory:" else _masked_without_scheme(url)
    if not _SCHEME.fullmatch(scheme + ":"):
        return _HIDDEN
    # A password may hold any character that somebody forgot to escape: up to the last @ all is his.
    credentials, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = credentials.partition(":")
        keeps_user = bool(colon) and "/" not in user and "?" not in user
        shown = f"{user}:{_HIDDEN}" if keeps_user else _HIDDEN
        rest = f"{shown}@{place}"
    shown_rest = _SECRET_PARAMETER.sub(lambda match: match.group(1) + _HIDDEN, rest)
    return f"{scheme}://{shown_rest}"


def secrets_of(urls: Iterable[str]) -> tuple[str, ...]:
    """The passwords and secret parameters in `urls`, as written and as decoded, longest first."""
    found: set[str] = set()
    for url in urls:
        _, _, rest = url.partition("://")
        credentials, at, _ = rest.rpartition("@")
        if at:
            user, colon, password = credentials.partition(":")
            found.add(password if colon else user)
        found.update(
            match.group(0)[len(match.group(1)) :] for match in _SECRET_PARAMETER.finditer(rest)
        )
    found |= {unquote(secret) for secret in found}
    return tuple(
        sorted((s for s in found if len(s) >= _SHORTEST_SECRET), key=lambda s: (-len(s), s))
    )


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """`text` with each of `secrets` replaced by ``***``."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text


def _masked_without_scheme(text: str) -> str:
    scheme = _SCHEME.match(text)
    return f"{scheme.group()}{_HIDDEN}" if scheme else _HIDDEN
