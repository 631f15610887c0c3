"""One batch from the file that was handed in to the report."""

from datetime import timedelta
from typing import Final

from examples.batch_import.messages import (
    ApplyChunk,
    BatchImported,
    BatchReceived,
    BatchStaged,
    ChunkApplied,
    DiscardStaging,
    FinishBatch,
    StageBatch,
)
from sagacity import CommandFailed, Saga, State, on, on_failure, on_timeout

IN_FLIGHT: Final = 4
"""Chunks sent ahead. Commands of one instance are worked on one after the other, so the order of
the records is kept; being ahead only spares the wait between two of them."""
PAUSE: Final = timedelta(seconds=30)
"""How long a batch waits before it tries a failed chunk again."""


class ImportSaga(Saga, key="batch_id", restartable=True):
    """Stage a file as a whole, then apply it chunk by chunk.

    Until the first chunk is sent a batch can be rejected, which leaves nothing behind. From then on
    it only goes forward: what cannot be applied now is tried again until it can.
    """

    staging = State()
    applying = State()
    halted = State()
    finishing = State()
    imported = State(final=True)
    rejected = State(final=True)

    batch_id: str
    path: str = ""
    chunks: int = 0
    sent: int = 0
    applied: int = 0

    @on(BatchReceived, starts=True, goto=staging)
    def stage(self, event: BatchReceived) -> None:
        self.path = event.path
        self.send(
            StageBatch(self.batch_id, event.path),
            undo=DiscardStaging(self.batch_id),
        )

    @on(BatchStaged, when=staging, goto=(applying, finishing))
    def apply(self, event: BatchStaged) -> None:
        self.chunks = event.chunks
        self._go_on()

    @on_failure(StageBatch, when=staging, goto=rejected)
    def reject(self, failure: CommandFailed) -> None:
        # A refusal has left nothing behind; after anything else the undo command clears up.
        self.compensate(failure.reason)

    @on(ChunkApplied, when=(applying, halted), goto=(applying, halted, finishing))
    def applied_one(self, event: ChunkApplied) -> None:
        self.applied = max(self.applied, event.chunk + 1)
        if self.state != "halted":
            self._go_on()

    @on_failure(ApplyChunk, FinishBatch, when=(applying, halted, finishing), goto=halted)
    def halt(self) -> None:
        self.set_timeout("again", after=PAUSE)

    @on_timeout("again", when=halted, goto=(applying, finishing))
    def try_again(self) -> None:
        self.sent = self.applied
        self._go_on()

    @on(BatchImported, when=(finishing, halted), goto=imported)
    def finish(self) -> None:
        pass

    def _go_on(self) -> None:
        if self.applied == self.chunks:
            self.send(FinishBatch(self.batch_id))
            self.goto(ImportSaga.finishing)
            return
        while self.sent < min(self.chunks, self.applied + IN_FLIGHT):
            self.send(ApplyChunk(self.batch_id, self.sent))
            self.sent += 1
        self.goto(ImportSaga.applying)
