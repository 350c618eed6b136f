# SPDX-License-Identifier: Apache-2.0
"""The seal on an image whose disk was handed over: LEAF.sealed beside it, a line of JSON.

While the record is there, nbdstream holds what clients write, and offers the generation of
its content that was handed over (`nbdstream.handover.generation`) and no other. To write to
the disk again, the record has to be removed first; the generation's name goes with it.

An image that QEMU had open itself is sealed afterwards, and with a *stamp*: QEMU knows
nothing of seals, but an image that it has written since no longer has that stamp.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.files import sync_directory

SUFFIX = ".sealed"
# Seconds for which a sealed disk holds a guest's write back instead of failing it: a QEMU
# whose migration failed at the last moment lets its guest go on by itself, and it takes
# the user who runs the migration a while to see that and to take the seal off.
HOLD = 600.0


@dataclass(frozen=True)
class Seal:
    """``export`` is the name under which the content is offered at ``listen``
    (``HOST:PORT`` or ``unix:PATH``). ``stamp``: the image's size and time of its last change,
    where nothing may have changed it since; ``format`` goes with it. ``tls``: the directory of the
    certificates with which it is offered, "" for an offer in clear."""

    generation: str
    export: str
    listen: str
    stamp: str = ""
    format: str = ""
    tls: str = ""

    @property
    def reason(self) -> str:
        """Why writes are refused, in one line."""
        return f"sealed: the disk was handed over as generation {self.generation}"


def stamp_of(image: str) -> str:
    """What changes with any change of an image, "" for none. Raises OSError."""
    try:
        status = Path(image).stat()
    except FileNotFoundError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def read_seal(leaf: str) -> Seal | None:
    """The seal on a leaf, if it is sealed. Raises LeafFormatError for a damaged record (the
    leaf has to be taken as sealed then) and for an image that was written since, OSError."""
    try:
        record = _path(leaf).read_bytes()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(record)
        seal = Seal(
            *(str(values[name]) for name in ("generation", "export", "listen")),
            *(str(values.get(name, "")) for name in ("stamp", "format", "tls")),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LeafFormatError(
            f"{_path(leaf)} is damaged; remove it only if the disk is not in use elsewhere"
        ) from error
    if seal.stamp and stamp_of(leaf) != seal.stamp:
        raise LeafFormatError(
            f"{leaf} was changed after it was handed over as generation {seal.generation}: "
            "a copy that relies on that has lost it; to use the image all the same, delete "
            f"{_path(leaf)}"
        )
    return seal


def write_seal(leaf: str, seal: Seal) -> None:
    """Seal a leaf, durably (worker). Raises OSError; it is not sealed then."""
    path = _path(leaf)
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        json.dump(asdict(seal), file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(str(path))


def remove_seal(leaf: str) -> None:
    """Take the seal off, durably (worker). Raises OSError."""
    _path(leaf).unlink(missing_ok=True)
    sync_directory(leaf)


def _path(leaf: str) -> Path:
    return Path(leaf + SUFFIX)
