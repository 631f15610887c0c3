"""``python -m sagacity`` is `saga-worker`."""

from sagacity.cli.worker import main

main(prog_name="python -m sagacity")
