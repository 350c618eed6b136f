# SPDX-License-Identifier: Apache-2.0
"""Local images: tell their format, open and create them.

The rest of nbdstream comes in here and gets a `nbdstream.leaf.base.Leaf`; which format
it is stays in this room. A format is a module of this package, named as QEMU names it,
with two functions: ``open_image`` and ``create`` (see `Format`).
"""

import fcntl
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from nbdstream.errors import LeafError, LeafFormatError, UsageError
from nbdstream.leaf import files
from nbdstream.leaf.base import BackingReference, Leaf

FORMATS = ("raw", "qcow2", "qed")
MAP_SUFFIX = ".map"  # a raw image with a backing has its allocation map beside it

_MAGICS = {b"QFI\xfb": "qcow2", b"QED\0": "qed"}
_SUFFIXES = {".qcow2": "qcow2", ".qed": "qed", ".raw": "raw", ".img": "raw"}


class Format(Protocol):
    """What a format's module offers."""

    def open_image(self, path: str, *, read_only: bool) -> Leaf:
        """Open and lock an image; see `open_leaf`."""
        ...

    def create(
        self,
        path: str,
        *,
        size: int,
        cluster_size: int | None,
        backing: BackingReference | None,
        **settings: bool,
    ) -> None:
        """Make a new image at a free name, and sync it; see `create_leaf`, which cleans up."""
        ...


def format_from_suffix(path: str) -> str:
    """The format that a new leaf of this name should have. Raises UsageError."""
    try:
        return _SUFFIXES[Path(path).suffix.lower()]
    except KeyError:
        known = ", ".join(_SUFFIXES)
        raise UsageError(
            f"cannot tell the format of {path} by its name ({known}): name one with --format"
        ) from None


def probe_format(path: str) -> str:
    """The format of an existing image.

    A map beside it, or the suffix ``.raw``, make it raw whatever it contains: a guest can
    write any magic number to the start of its raw disk, and must not thereby get to
    choose how we read it, or which backing we open. Raises OSError.
    """
    if _has_map(path) or Path(path).suffix.lower() == ".raw":
        return "raw"
    # O_NONBLOCK: what is not even a file is refused later, not waited for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _MAGICS.get(os.read(fd, 4), "raw")
    finally:
        os.close(fd)


def open_leaf(path: str, *, read_only: bool = False, format: str | None = None) -> Leaf:  # noqa: A002 - the option's name
    """Open and lock an image (may block: it repairs what a crash left behind).

    ``format`` overrules what `probe_format` says.

    Raises:
        LeafInUseError: another process has it open.
        LeafFormatError: damaged, or not of that format.
        LeafUnsupportedError: uses a feature that we refuse by name.
        OSError: it cannot be opened or read.
    """
    name = format or probe_format(path)
    module = _module(name)
    if name != "raw" and _has_map(path):
        raise LeafFormatError(f"{path} has an allocation map beside it: it is raw, not {name}")
    return module.open_image(path, read_only=read_only)


def create_leaf(
    path: str,
    *,
    format: str,  # noqa: A002 - the option's name
    size: int,
    cluster_size: int | None,
    backing: BackingReference | None,
    extended_l2: bool = True,
) -> None:
    """Make a new image of ``size`` bytes, durably: whole, or not at all.

    It is built in a temporary directory beside its place and then linked to its name; an
    existing file is never touched. ``cluster_size`` None: the format's default.
    ``extended_l2`` False: a qcow2 image without subclusters.

    Raises:
        UsageError: sizes or settings that the format cannot have.
        LeafError: ``path`` exists already, or the backing's name does not fit in.
        OSError: the directory or the disk refuses.
    """
    module = _module(format)
    if not extended_l2 and format != "qcow2":
        raise UsageError(f"{format} has no extended L2 entries: only qcow2 has")
    settings = {} if extended_l2 else {"extended_l2": False}
    if size <= 0:
        raise UsageError(f"a disk of {size} bytes makes no sense")
    directory = Path(path).parent
    with _creating_in(directory):
        if os.path.lexists(path):
            raise LeafError(f"{path} exists already: choose another name, or serve it as it is")
        with tempfile.TemporaryDirectory(prefix=f".{Path(path).name}.", dir=directory) as building:
            new = Path(building) / "new"
            module.create(
                str(new), size=size, cluster_size=cluster_size, backing=backing, **settings
            )
            # A raw image without its map would be taken for a complete one, so the map
            # comes first. One that a crash left behind here has no image: replace it.
            if _has_map(str(new)):
                Path(f"{new}{MAP_SUFFIX}").replace(f"{path}{MAP_SUFFIX}")
                files.sync_directory(path)
            os.link(new, path)
            files.sync_directory(path)


def _has_map(path: str) -> bool:
    return os.path.lexists(path + MAP_SUFFIX)


def _module(name: str) -> Format:
    if name not in FORMATS:
        raise UsageError(f"no such format: {name} (there are {', '.join(FORMATS)})")
    # Imported when first needed: starting to serve one format does not load the others.
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


@contextmanager
def _creating_in(directory: Path) -> Iterator[None]:
    """One creation at a time in a directory: "there is no such file" stays true."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
