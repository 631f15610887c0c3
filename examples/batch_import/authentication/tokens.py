"""Tokens and message ids of opt-in cycles: derived, so that the same cycle always has the same."""

import hmac
from hashlib import sha256
from typing import Final

from sagacity.core.delivery import derived_id

_DOMAIN: Final = "batch-import.example"


def cycle_id(user_ref: str, cycle: int) -> str:
    """The id of one opt-in cycle of a user."""
    return derived_id("opt-in", user_ref, str(cycle))


def message_id_of(user_ref: str, cycle: int) -> str:
    """The Message-ID of a cycle's mail, with its angle brackets."""
    return f"<{cycle_id(user_ref, cycle)}@{_DOMAIN}>"


def token_of(secret: str, user_ref: str, cycle: int, email: str) -> str:
    """The token in the link of a cycle's mail; nobody can make it without the secret."""
    text = "\0".join((user_ref, str(cycle), email))
    return hmac.new(secret.encode(), text.encode(), sha256).hexdigest()


def token_hash(token: str) -> str:
    """What is stored of a token: enough to recognise it, too little to use it."""
    return sha256(token.encode()).hexdigest()
