"""`python -m examples.batch_import`; see `cli.py`."""

from examples.batch_import.cli import main

if __name__ == "__main__":
    main(prog_name="python -m examples.batch_import")
