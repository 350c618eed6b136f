# SPDX-License-Identifier: Apache-2.0
"""Where targets that need files put them: in memory, and gone at the end of the process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def directory() -> Path:
    """A directory of this process, in memory where the system has it."""
    memory = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="nbdstream-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def scratch(name: str) -> Path:
    """The path of a file that a target may write."""
    return directory() / name
