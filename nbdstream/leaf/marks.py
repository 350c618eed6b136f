# SPDX-License-Identifier: Apache-2.0
"""What nbdstream remembers of an image where no guest can write: extended attributes.

A guest writes the bytes of a raw disk, and the author of a qcow2 or QED image wrote all of
its header. So neither may decide how an image is read, nor which backing it is given
(invariant 13). Attributes of the file hold what was decided by its owner:

- ``user.nbdstream.format``: the format that the image was created in or last opened for
  writing as;
- ``user.nbdstream.backing``: a digest of the backing that the owner named, by ``create -b`` or
  ``serve -b``. A backing that is recorded in the image and has no such digest was chosen
  by the image's author;
- ``user.nbdstream.map``: a raw image is not complete, and means nothing without the allocation map
  beside it;
- ``user.nbdstream.control``: the control socket of the server that serves the file now, so that
  users can name the leaf instead. A server that crashed leaves it behind.

The attributes stay with the file when it is renamed; a copy has them only if the tool that
copies keeps them (``cp --preserve=xattr``, ``rsync -X``). Some file systems have none. What
has no mark is treated as made elsewhere.
"""

import contextlib
import hashlib
import os

from nbdstream.leaf.base import BackingReference

FORMAT = "user.nbdstream.format"
BACKING = "user.nbdstream.backing"
CONTROL = "user.nbdstream.control"
MAP = "user.nbdstream.map"


def format_of(file: str | int) -> str:
    """The format that a file is marked with, or "". Never raises for what has no marks."""
    return _get(file, FORMAT)


def mark_format(file: str | int, image_format: str) -> None:
    """Mark a file with its format, where the file system can do that."""
    _set(file, FORMAT, image_format)


def vouch(file: str | int, backing: BackingReference) -> None:
    """Remember that the owner has named this backing, where the file system can do that."""
    _set(file, BACKING, _digest(backing))


def is_vouched_for(file: str | int, backing: BackingReference) -> bool:
    """Whether the owner of a file has named this backing for it."""
    return _get(file, BACKING) == _digest(backing)


def needs_map(file: str | int) -> bool:
    """Whether a raw image is marked as one that has an allocation map."""
    return _get(file, MAP) != ""


def mark_map(file: str | int) -> None:
    """Remember that a raw image has a map, where the file system can do that."""
    _set(file, MAP, "needed")


def unmark_map(file: str | int) -> None:
    """A raw image is complete: it needs no map from now on. Raises OSError."""
    if needs_map(file):
        os.removexattr(file, MAP)


def control_of(file: str | int) -> str:
    """The control socket that a file is marked with, or ""."""
    return _get(file, CONTROL)


def mark_control(file: str | int, socket: str) -> None:
    """Remember the control socket of a file's server, where the file system can do that."""
    _set(file, CONTROL, socket)


def unmark_control(file: str | int, socket: str) -> None:
    """Forget the control socket, if it is still this one."""
    if control_of(file) == socket:
        with contextlib.suppress(OSError):
            os.removexattr(file, CONTROL)


def _digest(backing: BackingReference) -> str:
    named = f"{backing.format}\0{backing.uri}".encode(errors="surrogateescape")
    return hashlib.sha256(named).hexdigest()


def _get(file: str | int, name: str) -> str:
    try:
        return os.getxattr(file, name).decode(errors="replace")
    except OSError:
        return ""


def _set(file: str | int, name: str, value: str) -> None:
    if _get(file, name) == value:
        return
    with contextlib.suppress(OSError):
        os.setxattr(file, name, value.encode())
