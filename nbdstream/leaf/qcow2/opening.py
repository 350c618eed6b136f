# SPDX-License-Identifier: Apache-2.0
"""Open an image, and before it is written to, make it one that we may write to.

Nothing is written before all that can be checked has been (see `leaf`). Opening for
writing changes an image that

- was left by a process that was killed: what its redo log has is written;
- was not closed, or has refcounts that are wrong: they are rebuilt from the tables;
- has version 2: it becomes version 3, which has a dirty bit and zero clusters;
- has persistent dirty bitmaps: our writes would not be recorded in them, so they go;
- has other autoclear features, which we do not know: their bits are cleared.
"""

import logging
import os
from dataclasses import replace

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.leaf import redo
from nbdstream.leaf.base import CheckResult
from nbdstream.leaf.durability import Syncs, reread
from nbdstream.leaf.locking import open_locked
from nbdstream.leaf.qcow2.check import check_image
from nbdstream.leaf.qcow2.header import (
    BITMAPS_EXTENSION,
    DIRTY,
    HEADER_LENGTH,
    REMEDY,
    STRUCT_V3,
    Header,
)
from nbdstream.leaf.qcow2.header_file import install, read_header
from nbdstream.leaf.qcow2.leaf import Qcow2Leaf
from nbdstream.leaf.qcow2.redo import recover
from nbdstream.leaf.qcow2.trust import Trust, look_at_refcounts
from nbdstream.units import format_count

log = logging.getLogger(__name__)


def open_image(path: str, *, read_only: bool, repair: bool = False) -> Qcow2Leaf:
    """Open and lock an image (may block: see the module's docstring).

    ``repair``: repair it first, also if it is marked corrupt, before anything in it is relied
    on. What that found is in the result of the leaf's first check with ``repair``.

    Raises LeafInUseError, LeafFormatError, LeafUnsupportedError, OSError.
    """
    fd = open_locked(path, read_only=read_only)
    syncs = Syncs(path)
    try:
        header = read_header(fd, path)
        try:
            mended, trusted = CheckResult(), False
            if not read_only:
                _require_writable(path, header, repair=repair)
                header = _recovered(fd, path, header, syncs)
                if repair:
                    mended, header = _repaired(fd, header, syncs)
                header, trusted = _made_consistent(fd, path, header, syncs)
            leaf = Qcow2Leaf(
                path, fd, header, syncs, read_only=read_only, mended=mended, trusted=trusted
            )
            if not read_only:
                leaf.replace_header(_writable(header))
                leaf.begin_redo()
        except LeafFormatError as error:
            raise LeafFormatError(f"{path}: {error}") from error
    except BaseException:
        os.close(fd)
        raise
    return leaf


def _require_writable(path: str, header: Header, *, repair: bool) -> None:
    """Refuse what must not be written to. Raises LeafUnsupportedError."""
    if header.corrupt and not repair:
        raise LeafUnsupportedError(f"{path} is marked corrupt: open it read-only, or {REMEDY}")
    if header.nb_snapshots:
        raise LeafUnsupportedError(
            f"{path} has {header.nb_snapshots} internal snapshots: delete them (qemu-img snapshot"
            " -d), or open it read-only"
        )


def _recovered(fd: int, path: str, header: Header, syncs: Syncs) -> Header:
    """Complete what a killed process had begun. Raises OSError."""

    def apply(records: list[redo.Record]) -> None:
        nonlocal header
        header = recover(fd, header, records, syncs)

    redo.recover(fd, path, header.stamp, apply)
    return header


def _repaired(fd: int, header: Header, syncs: Syncs) -> tuple[CheckResult, Header]:
    """Repair all that can be repaired. Raises LeafFormatError if the image stays marked corrupt,
    OSError.
    """
    syncs.sync(fd)
    reread(fd)
    if header.version == 2:
        header = install(fd, header, _writable(header), syncs)
    result, header = check_image(fd, header, syncs, repair=True)
    if header.corrupt:
        left, header = check_image(fd, header, syncs, repair=False)
        raise LeafFormatError(
            f"it stays marked corrupt, {format_count(left.errors, 'error')} cannot be repaired:"
            f" {left.messages[0]}"
        )
    return result, header


def _made_consistent(fd: int, path: str, header: Header, syncs: Syncs) -> tuple[Header, bool]:
    """Drop dirty bitmaps; count the references of what was not closed, or has wrong refcounts.

    Returns the header, and whether the refcounts can be trusted.
    """
    if header.extension(BITMAPS_EXTENSION) is not None:
        log.warning("%s: its persistent dirty bitmaps are dropped", path)
        header = _without_bitmaps(fd, header, syncs)
    if header.dirty:
        log.warning("%s was not closed cleanly: its references are counted", path)
    else:
        trust, why = look_at_refcounts(fd, header, syncs)
        if trust is not Trust.WRONG:
            return header, trust is Trust.RIGHT
        log.warning("%s has wrong refcounts, its references are counted: %s", path, why)
    syncs.sync(fd)
    reread(fd)
    result, header = check_image(fd, header, syncs, repair=True, strict=True)
    left = result.errors + result.leaks - result.repaired
    if left:
        raise LeafFormatError(f"{left} of {result.messages} could not be repaired")
    log.warning("%s: repaired %d refcounts", path, result.repaired)
    return header, True


def _without_bitmaps(fd: int, header: Header, syncs: Syncs) -> Header:
    """Drop the bitmaps; the dirty bit makes sure that their space is found to be free."""
    check_image(fd, header, syncs, repair=False, strict=True)
    extensions = tuple(e for e in header.extensions if e.type != BITMAPS_EXTENSION)
    new = replace(
        header,
        extensions=extensions,
        autoclear_features=0,
        incompatible_features=header.incompatible_features | DIRTY,
    )
    return install(fd, header, new, syncs)


def _writable(header: Header) -> Header:
    """The header that the image has once we may write to it."""
    if header.version == 2:
        return replace(
            header,
            version=3,
            header_length=HEADER_LENGTH,
            additional=bytes(HEADER_LENGTH - STRUCT_V3.size),
        )
    # The stamp is another one in a moment: it needs no durable rewrite of the header.
    return header.stamped(header.stamp)
