"""The importing service: `saga-worker examples.batch_import.importing.service:service`."""

from examples.batch_import.importing.handlers import (
    accounts_failed,
    accounts_ready,
    apply_chunk,
    discard_staging,
    email_confirmed,
    finish_batch,
    receive_batch,
    stage_batch,
)
from examples.batch_import.importing.sagas import ImportSaga
from sagacity import Service

service = Service(
    "importing",
    sagas=[ImportSaga],
    handlers=[
        receive_batch,
        stage_batch,
        apply_chunk,
        finish_batch,
        discard_staging,
        email_confirmed,
        accounts_ready,
        accounts_failed,
    ],
)
