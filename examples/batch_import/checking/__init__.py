"""The invariants of the whole program, over every database, every ledger and the mail store.

`check_all` reads what is there and says for each invariant what contradicts it. It trusts no
service's word about another: the ledgers and the mail store are the remote systems' own files.
"""

from examples.batch_import.checking.evidence import Evidence
from examples.batch_import.checking.verdict import Verdict, check_all, held_up

__all__ = ["Evidence", "Verdict", "check_all", "held_up"]
