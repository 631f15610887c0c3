"""Which services there are, and where each says what its tables are."""

import importlib
from typing import Final

from sqlalchemy import MetaData

SERVICES: Final = ("importing", "authentication", "accounts")
"""Each is a package beside this module with `service.py` and `tables.py`, and has its own database."""


def tables_of(service: str) -> MetaData:
    """The tables of one context."""
    metadata = importlib.import_module(f"examples.batch_import.{service}.tables").metadata
    assert isinstance(metadata, MetaData)
    return metadata
