"""The pure core: what a saga is and what a message does to it.

Standard library and msgspec only. No clock, no randomness, no I/O and no logging in here: time and
identity are arguments, and everything a transaction must write is returned as a value.
"""
