# SPDX-License-Identifier: Apache-2.0
"""Which format an image has, decided without looking at bytes that others wrote.

A guest can write any magic number to the start of its raw disk. If that made the next
start read the disk as qcow2, the guest would choose the backing file, and could read any
file of the host. So content never decides *for* a format; it can only make us refuse. In
this order:

1. the format that the user names (``-f``);
2. the mark on the file (`nbdstream.leaf.marks`), which a guest cannot write;
3. an allocation map beside it: raw;
4. the suffix ``.qcow2`` or ``.qed``, which the user chose;
5. anything else is raw, unless it starts (or ends) as an image of another format does:
   then it is refused, and the user has to say which it is.

By rule 5 an unmarked file may be raw today and refused tomorrow, because the guest wrote a
magic number; it is never read as another format. Opening an image for writing marks it, so
that this happens only where the file system has no extended attributes.
"""

import os
import stat
from pathlib import Path

from nbdstream.errors import LeafFormatError, LeafUnsupportedError, UsageError
from nbdstream.leaf import marks

FORMATS = ("raw", "qcow2", "qed")
MAP_SUFFIX = ".map"  # a raw image with a backing has its allocation map beside it

_SUFFIXES = {".qcow2": "qcow2", ".qed": "qed", ".raw": "raw", ".img": "raw"}
# (offset, bytes, what it is), as libmagic and each format's specification have it.
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
)
_HEAD = 0x44
_FOOTER = 512  # a fixed VHD has its header at the end
_FOOTER_MAGICS = ((b"conectix", "VHD"), (b"koly", "DMG"))


def format_from_suffix(path: str) -> str:
    """The format that a new leaf of this name should have. Raises UsageError."""
    try:
        return _SUFFIXES[Path(path).suffix.lower()]
    except KeyError:
        known = ", ".join(_SUFFIXES)
        raise UsageError(
            f"cannot tell the format of {path} by its name ({known}): name one with --format"
        ) from None


def named_otherwise(path: str) -> bool:
    """Whether the name of an image says that it is not raw."""
    return _SUFFIXES.get(Path(path).suffix.lower(), "raw") != "raw"


def map_path(path: str) -> str:
    """Where the allocation map of a raw image is: beside the file itself, whatever symbolic links
    ``path`` goes through."""
    return os.path.realpath(path) + MAP_SUFFIX


def has_map(path: str) -> bool:
    """Whether there is an allocation map beside an image."""
    return os.path.lexists(map_path(path))


def probe_format(path: str) -> str:
    """The format of an existing image, by the rules above that follow the first.

    Raises:
        LeafFormatError: it cannot be told; the user has to name it.
        LeafUnsupportedError: not a regular file.
        OSError: it cannot be opened or read.
    """
    # O_NONBLOCK: opening a FIFO would wait for a peer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LeafUnsupportedError(f"{path} is not a regular file: leaf images are files")
        marked = marks.format_of(fd)
        if marked in FORMATS:
            return marked
        if has_map(path):
            return "raw"
        named = _SUFFIXES.get(Path(path).suffix.lower(), "raw")
        if named == "raw":
            _refuse_other_formats(path, _looks_like(fd, status.st_size))
        return named
    finally:
        os.close(fd)


def _looks_like(fd: int, size: int) -> str:
    """The format whose magic number a file has, or ""."""
    head = os.pread(fd, _HEAD, 0)
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    footer = os.pread(fd, _FOOTER, max(size - _FOOTER, 0))
    return next((name for magic, name in _FOOTER_MAGICS if footer.startswith(magic)), "")


def _refuse_other_formats(path: str, found: str) -> None:
    """Raises LeafFormatError if ``found`` names a format."""
    if not found:
        return
    if found.lower() in FORMATS:
        other = f"-f {found.lower()} if that is what it is"
    else:
        other = f"convert it if that is what it is ({found} cannot be a leaf)"
    raise LeafFormatError(
        f"{path} looks like a {found} image, but its name does not say so, and a guest could "
        f"have written that: give -f raw to take its bytes as they are, {other}"
    )
