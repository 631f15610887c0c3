"""`saga-worker` for one service of the example, ending with the process that started it.

`python -m examples.batch_import.worker examples.batch_import.importing.service:service` takes what
`saga-worker` takes. Standard input must be a pipe that the starter keeps open.
"""

from examples.batch_import.serving import end_with_stdin
from sagacity.cli.worker import main

if __name__ == "__main__":
    end_with_stdin()
    main(prog_name="python -m examples.batch_import.worker")
