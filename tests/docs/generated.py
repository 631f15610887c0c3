"""Writes the parts of the documentation that are made from the program: ``python -m tests.docs.generated``."""

from __future__ import annotations

import asyncio
import sys

from tests.docs import group_commit, log_statements
from tests.servers.postgres import running_postgres


def main() -> None:
    log_statements.PAGE.write_text(log_statements.page(), encoding="utf-8")
    with running_postgres() as server:
        sent = asyncio.run(group_commit.statements(server.new_database("asyncpg")))
    page = group_commit.PAGE
    page.write_text(
        group_commit.page_with(page.read_text(encoding="utf-8"), sent), encoding="utf-8"
    )
    sys.stdout.write(f"wrote {log_statements.PAGE.name} and {page.name}\n")


if __name__ == "__main__":
    main()
