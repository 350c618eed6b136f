# SPDX-License-Identifier: Apache-2.0
"""Socket activation: any LISTEN_FDS and LISTEN_PID in the environment.

Accepts, or raises UsageError. The descriptors themselves are played: after the third, there is
no socket.
"""

import os
from collections.abc import Iterator

from fuzz.patches import patched
from fuzz.target import Target
from nbdstream.errors import UsageError
from nbdstream.net import listeners

THERE = 3


def _inherited(fd: int) -> int:
    if fd >= 3 + THERE:
        raise UsageError(f"file descriptor {fd}: no socket")
    return fd


def run(data: bytes) -> object:
    pid, _, count = data.decode("utf-8", "surrogateescape").partition(",")
    environment = {
        "LISTEN_PID": pid.replace("PID", str(os.getpid())),
        "LISTEN_FDS": count,
        "LISTEN_FDNAMES": count,
        "HOME": "/",
    }
    try:
        with patched(listeners, _inherited=_inherited):
            found = listeners.from_systemd(environment)
    finally:
        assert environment == {"HOME": "/"}
    assert len(found) <= THERE
    return len(found)


def seeds() -> Iterator[bytes]:
    for text in ("PID,1", "PID,3", "PID,4", "1,1", "PID,0", "PID,-1", "PID,", ",", "PID,٣"):
        yield text.encode()
    # int() refuses more than 4300 digits.
    yield b"PID," + b"9" * 5000


TARGET = Target("systemd", run, (UsageError,), seeds, longest=8192)
