"""The input format of the example: XML in the namespace `urn:batch-import:1`, read as a stream.

`read_batch` is one pass over the file with flat memory. It yields a `BatchHead`, then a `UserRecord`,
`OrderRecord` or `RefusedRecord` for every record in file order, then a `BatchTail`; a fault of the file
itself raises `FileRefused`, possibly after records were yielded, so stage them before acting on them.
"""

from examples.batch_import.batch_file.reader import Limits, digest, read_batch
from examples.batch_import.batch_file.records import (
    SYSTEMS,
    BatchHead,
    BatchItem,
    BatchTail,
    Fault,
    FileRefused,
    Line,
    OrderRecord,
    RefusedRecord,
    Source,
    SystemNeed,
    UserRecord,
)

__all__ = [
    "SYSTEMS",
    "BatchHead",
    "BatchItem",
    "BatchTail",
    "Fault",
    "FileRefused",
    "Limits",
    "Line",
    "OrderRecord",
    "RefusedRecord",
    "Source",
    "SystemNeed",
    "UserRecord",
    "digest",
    "read_batch",
]
