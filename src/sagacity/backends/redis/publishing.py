"""Entries on their way into streams: one command and one reply for a whole batch.

An XADD that is a command of redis-py costs the worker ten times as much CPU. So a script adds them,
and takes each entry packed: msgpack is written in one call here and read in one there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sagacity.backends.redis.entry import entry_size
from sagacity.codec import to_fields
from sagacity.core.delivery import Envelope
from sagacity.core.errors import BusError

_ADD = """
local failure
local failed = {}
for i = 1, #ARGV, 2 do
  local entry = cmsgpack.unpack(ARGV[i])
  local last = #entry
  local key = KEYS[entry[last]]
  if not failed[key] then
    entry[last] = ARGV[i + 1]
    local reply = redis.pcall('XADD', key, '*', unpack(entry))
    if type(reply) == 'table' then
      failed[key] = true
      failure = failure or {err = string.gsub(reply.err, '^@user_script: ?%d+: %-?', '')}
    end
  end
end
return failure or #ARGV / 2
"""
"""Adds the entries in order; a stream that refuses one gets no later one, the others all theirs.

Arguments, two for each entry: its flat fields as msgpack, the number of its key in the place of the
body, and then the body, which msgpack of Redis could not tell from text. Redis ends its memory before
a script or after it, never inside (protocol.md M17). Redis 6.2 tells the line of the script first.
"""

_pack = msgspec.msgpack.Encoder().encode


class Batch:
    """Entries for one script: all go to one server."""

    def __init__(self, payload_bytes_max: int, entry_bytes_max: int) -> None:
        self._payload_bytes_max, self._entry_bytes_max = payload_bytes_max, entry_bytes_max
        self._numbers: dict[str, int] = {}
        """Key of a stream -> its number in the command, from 1."""
        self._packed: list[bytes] = []

    def add(self, key: str, envelope: Envelope) -> None:
        """Takes up a message. Raises BusError for one that is too large."""
        fields: list[Any] = to_fields(envelope)
        body = envelope.body
        fields[-1] = self._numbers.setdefault(key, len(self._numbers) + 1)
        header = _pack(fields)
        # Packed is never shorter, so only what seems too large has to be measured.
        if len(body) > self._payload_bytes_max or (
            len(header) + len(body) > self._entry_bytes_max
            and entry_size(to_fields(envelope)) > self._entry_bytes_max
        ):
            raise BusError(
                f"message {envelope.id} of type {envelope.type} for topic {envelope.topic} has a body "
                f"of {len(body)} bytes ({entry_size(to_fields(envelope))} with its headers); expected "
                f"at most {self._payload_bytes_max}; send a reference to large data, or raise "
                "payload_bytes_max on every worker"
            )
        self._packed += (header, body)

    def command(self) -> tuple[str | int | bytes, ...]:
        """The command that adds all of them."""
        return ("EVAL", _ADD, len(self._numbers), *self._numbers, *self._packed)
