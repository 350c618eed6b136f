# SPDX-License-Identifier: Apache-2.0
"""Takes away the name of a file that is open, wherever it has been moved meanwhile.

A name that was right when a leaf was opened may stand for another leaf's file by now. So
the file's present name is asked of the kernel (``/proc/self/fd``), and is only removed if
it still leads to the file that we have open: device and inode are compared, in the
directory that is open for it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from nbdstream.errors import LeafError
from nbdstream.leaf.durability import Syncs


def remove(fd: int, known_as: str, syncs: Syncs) -> None:
    """Worker: unlink the open file ``fd``, durably. ``known_as`` is the name it was opened by.

    A file that has no name any more is fine. Raises LeafError where its name cannot be
    found: then nothing is removed; OSError.
    """
    for place in _places(fd, known_as):
        try:
            directory = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _leads_to(fd, place.name, directory):
                os.unlink(place.name, dir_fd=directory)
                syncs.sync_names(directory)
                return
        finally:
            os.close(directory)
    if os.fstat(fd).st_nlink:
        raise LeafError(
            f"{known_as} was moved, and cannot be found: the disk is complete, so remove the"
            " file by hand once it is not served any more"
        )


def _places(fd: int, known_as: str) -> Iterator[Path]:
    """Where the file may be: where the kernel says, and where it was."""
    try:
        yield Path(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115 - beside the other os calls
    except OSError:
        pass  # no /proc here
    yield Path(known_as).absolute()


def _leads_to(fd: int, name: str, directory: int) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(fd))
