# SPDX-License-Identifier: Apache-2.0
"""Long replies as bytes, without keeping the event loop busy for long."""

import json

import trio

from nbdstream.qmp.protocol import Return, encode

# Elements of a list that are encoded before other tasks get their turn: about 0.3 ms.
AT_ONCE = 256


async def encode_in_turns(message: Return) -> bytes:
    """The same as `nbdstream.qmp.protocol.encode`, with a checkpoint now and then if a member
    of the returned object is a long list."""
    value = message.value
    if not isinstance(value, dict) or not any(map(_is_long, value.values())):
        return encode(message)
    members = []
    for name, member in value.items():
        if _is_long(member):
            pieces = []
            for start in range(0, len(member), AT_ONCE):
                pieces.append(_dump(member[start : start + AT_ONCE])[1:-1])
                await trio.lowlevel.checkpoint()
            members.append(f"{_dump(name)}:[{','.join(pieces)}]")
        else:
            members.append(f"{_dump(name)}:{_dump(member)}")
    # The value is the first thing in the line that is "null".
    frame = encode(Return(None, message.id))
    return frame.replace(b"null", f"{{{','.join(members)}}}".encode(), 1)


def _is_long(value: object) -> bool:
    return isinstance(value, list) and len(value) > AT_ONCE


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
