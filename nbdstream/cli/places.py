# SPDX-License-Identifier: Apache-2.0
"""Where things go that the user did not place: sockets, the leaf of a passing guest, the store.

A socket that all users could connect to would let every user of the host write the disk, so it
is in a directory that only its owner can enter. A leaf grows as large as its disk, so it does
not go where a file system in memory is usual (``/tmp``).
"""

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbdstream.backing import BackingOpener, open_backing
from nbdstream.errors import UsageError
from nbdstream.leaf.files import is_in_memory
from nbdstream.streamer.profile_store import ProfileStore, default_directory
from nbdstream.units import format_size

if TYPE_CHECKING:
    from nbdstream.store.layout import Store

log = logging.getLogger(__name__)

SOCKET_MODE = 0o600
# A Unix socket's path may have 107 bytes; what is longer than this is cut.
_NAME_MOST = 48


@contextmanager
def private_socket(leaf: str) -> Iterator[Path]:
    """Where a leaf is served if nothing else is said: ``$XDG_RUNTIME_DIR/nbdstream/LEAF.sock``,
    or a name in a private directory that goes away afterwards."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and _is_private(Path(runtime)):
        directory = Path(runtime) / "nbdstream"
        directory.mkdir(mode=0o700, exist_ok=True)
        if _is_private(directory):
            yield directory / f"{os.path.basename(leaf)[:_NAME_MOST]}.sock"
            return
    with tempfile.TemporaryDirectory(prefix="nbdstream-") as temporary:
        yield Path(temporary) / "nbd.sock"


def _is_private(directory: Path) -> bool:
    """Whether a directory is ours, and no other user may enter it."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return mine and not status.st_mode & 0o077


@contextmanager
def roomy_directory() -> Iterator[Path]:
    """A temporary directory for a leaf: in ``$TMPDIR``, else in ``$XDG_CACHE_HOME``, else in
    ``/var/tmp``."""
    places = [os.environ.get("TMPDIR"), os.environ.get("XDG_CACHE_HOME"), "/var/tmp"]
    place = next(name for name in places if name)
    with tempfile.TemporaryDirectory(prefix="nbdstream-", dir=place) as directory:
        yield Path(directory)


def opener_for(
    store: str | None,
    leaf: str,
    *,
    temporary: bool = False,
    standby: bool = False,
    thin: bool = False,
    stream: str = "off",
) -> BackingOpener:
    """How to open a leaf's backing: by way of a store if there is one ("": the host's). For a
    ``thin`` leaf it is the store that streams.

    Raises UsageError, StoreError.
    """
    if store is None:
        if thin:
            raise UsageError("--thin leaves the data in the image store: it needs --store")
        return open_backing
    if standby:
        raise UsageError("--standby follows a disk that is in use: it does not go with --store")
    # Here: most servers do without a store.
    from nbdstream.store.client import StoreOpener

    return StoreOpener(open_store(store), leaf, temporary, pull=thin and stream == "on")


def open_store(place: str) -> "Store":
    """The image store in a directory, "" for the host's. Raises StoreError."""
    from nbdstream.store.layout import Store, default_place

    return Store(Path(place) if place else default_place())


def named_profile(prefetch: str) -> str | None:
    """The file that ``--prefetch`` names, if it does."""
    return None if prefetch in ("auto", "off") else prefetch


def profile_store(prefetch: str) -> ProfileStore | None:
    """The user's collection of boot profiles, unless ``--prefetch`` says to do without it."""
    return ProfileStore(default_directory()) if prefetch == "auto" else None


def warn_if_tight(leaf: Path, size: int) -> None:
    """Warn if a disk of ``size`` bytes may not fit where its temporary leaf is."""
    free = shutil.disk_usage(leaf.parent).free
    fd = os.open(leaf.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        in_memory = is_in_memory(fd)
    finally:
        os.close(fd)
    room = f"{format_size(free)} free for a disk of {format_size(size)}"
    if in_memory:
        log.warning("the temporary leaf is in memory (%s, %s): set TMPDIR", leaf.parent, room)
    elif free < size:
        log.warning("the temporary leaf may not fit in %s (%s): set TMPDIR", leaf.parent, room)
