# SPDX-License-Identifier: Apache-2.0
"""Small files of a store: written whole and durably, read without trust in what is in them."""

import json
import os
from pathlib import Path
from typing import Any

from nbdstream.leaf.files import sync_directory

# No record of ours comes near this.
RECORD_MOST = 1 << 20


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Replace a file by a JSON object, durably: it has the old content or the new one,
    whatever happens. Raises OSError."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "w") as file:
            json.dump(values, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(str(path))


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or something else is in it.
    Raises OSError."""
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(RECORD_MOST))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def touch(path: Path) -> None:
    """Set a file's time to now; it is created. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.utime(fd)
    finally:
        os.close(fd)
