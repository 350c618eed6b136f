# SPDX-License-Identifier: Apache-2.0
"""Where targets that need files put them: in memory, and gone at the end of the process."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

# Set by `fuzz.__main__` for a process that libFuzzer ends, without Python's own end.
GIVEN = "NBDSTREAM_FUZZ_DIRECTORY"


def make_directory() -> str:
    """A new directory, in memory where the system has that; the caller removes it."""
    memory = Path("/dev/shm")
    return tempfile.mkdtemp(prefix="nbdstream-fuzz-", dir=memory if memory.is_dir() else None)


@cache
def directory() -> Path:
    """The directory of this process."""
    if GIVEN in os.environ:
        return Path(os.environ[GIVEN])
    made = make_directory()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def scratch(name: str) -> Path:
    """The path of a file that a target may write."""
    return directory() / name
