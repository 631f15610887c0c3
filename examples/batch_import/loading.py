"""Handing a batch file in: what `load` does. The outcome follows later; see `status.py`."""

from pathlib import Path

import anyio
import msgspec

from examples.batch_import.batch_file import BatchHead, FileRefused, digest, read_batch
from examples.batch_import.messages import ReceiveBatch
from examples.batch_import.sending import send


class Receipt(msgspec.Struct, frozen=True):
    """That a file was taken; `batch_id` asks for what becomes of it."""

    batch_id: str
    digest: str
    command_id: str
    """Everything that follows from this file carries it as correlation id."""


async def submit(
    file: Path, *, store: str, bus: str = "", prefix: str = "", actor: str = ""
) -> Receipt:
    """Take a file; durable in the importing service's database when this returns.

    Raises OSError where the file cannot be read. What is wrong inside it is told by the batch.
    """
    path = await anyio.Path(file).absolute()
    found = await anyio.to_thread.run_sync(digest, str(path))
    batch_id = await anyio.to_thread.run_sync(_batch_id, str(path), found)
    command = ReceiveBatch(batch_id, str(path), found)
    command_id = await send(
        command, store=store, bus=bus, prefix=prefix, source="batch-import", actor=actor
    )
    return Receipt(batch_id, found, command_id)


def _batch_id(path: str, file_digest: str) -> str:
    """What the file calls itself; a file whose first lines are no good goes by its content."""
    try:
        head = next(iter(read_batch(path)))
    except (FileRefused, StopIteration):
        return f"unreadable-{file_digest[:16]}"
    assert isinstance(head, BatchHead)
    return head.id
