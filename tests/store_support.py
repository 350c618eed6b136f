# SPDX-License-Identifier: Apache-2.0
"""What the tests of the image store share."""

from pathlib import Path

from testbed.peers import PeerError
from tests.serve_support import nbdstream_here


def image(*args: str | Path) -> str:
    """`nbdstream image ARGS` in this process. Raises PeerError with its words if it fails."""
    done = nbdstream_here("image", *args)
    if done.returncode:
        raise PeerError(done.stdout + done.stderr)
    return done.stdout
