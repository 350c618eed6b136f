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
from nbdstream.leaf import files, marks
from nbdstream.leaf.base import BackingReference, Leaf
from nbdstream.leaf.probe import (
    FORMATS,
    MAP_SUFFIX,
    format_from_suffix,
    has_map,
    named_otherwise,
    probe_format,
)

__all__ = [
    "FORMATS",
    "MAP_SUFFIX",
    "create_leaf",
    "format_from_suffix",
    "open_leaf",
    "probe_format",
]


class Format(Protocol):
    """What a format's module offers."""

    def open_image(self, path: str, *, read_only: bool, repair: bool = False) -> Leaf:
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


def open_leaf(
    path: str,
    *,
    read_only: bool = False,
    format: str | None = None,  # noqa: A002 - the option's name
    repair: bool = False,
) -> Leaf:
    """Open and lock an image (may block: it repairs what a crash left behind).

    ``format`` overrules what `probe_format` says. An image that is opened for writing is
    marked with its format, so that what a guest writes cannot change it later. ``repair`` is
    for a check that repairs: an image may be open for writing then although it is damaged.

    Raises:
        LeafInUseError: another process has it open.
        LeafFormatError: damaged, or not of that format.
        LeafUnsupportedError: uses a feature that we refuse by name.
        OSError: it cannot be opened or read.
    """
    name = format or probe_format(path)
    module = _module(name)
    if name != "raw" and has_map(path):
        raise LeafFormatError(f"{path} has an allocation map beside it: it is raw, not {name}")
    leaf = module.open_image(path, read_only=read_only, repair=repair)
    if not read_only:
        marks.mark_format(leaf.fd, name)
    return leaf


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
            _mark(str(new), format, backing)
            _require_lasting(path, str(new), format)
            # A raw image without its map would be taken for a complete one, so the map
            # comes first. One that a crash left behind here has no image: replace it.
            if has_map(str(new)):
                Path(f"{new}{MAP_SUFFIX}").replace(f"{path}{MAP_SUFFIX}")
                files.sync_directory(path)
            os.link(new, path)
            try:
                files.sync_directory(path)
            except OSError:
                Path(path).unlink()
                raise


def _mark(path: str, image_format: str, backing: BackingReference | None) -> None:
    """Mark a new image, before it has its name, durably."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        marks.mark_format(fd, image_format)
        if backing is not None:
            marks.vouch(fd, backing)
        if has_map(path):
            marks.mark_map(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def _require_lasting(path: str, new: str, image_format: str) -> None:
    """Without marks only the name tells that an image is raw, once a guest has written to it.

    Raises UsageError if it would tell something else.
    """
    if image_format == "raw" and marks.format_of(new) != "raw" and named_otherwise(path):
        raise UsageError(
            f"{path}: this file system has no extended attributes to mark a raw image with: "
            "call it .raw or .img"
        )


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
