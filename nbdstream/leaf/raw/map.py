# SPDX-License-Identifier: Apache-2.0
"""The allocation map of a raw leaf, ``disk.raw.map``: which blocks the leaf has.

    0     header slot 0     one page each; the valid one with the higher generation
    4096  header slot 1     counts, so that a torn update leaves the older one
    4088  the stamp of the leaf's redo log (`nbdstream.leaf.redo`), 8 bytes, or 0
    8192  one bit per block of 4 KiB, the least significant bit of a byte first

Bits only ever go from 0 to 1. Any sector of a bit page that a crash leaves behind, old or
new, is therefore true of the data as it was at some flush: bits need no checksum, no
order among themselves, and no journal. The one order that matters is that data is
synced before its bits are written, and `RawLeaf` sees to that.

The file has its full length from the start, but is sparse: what was never touched is a
hole, and costs nothing. One page of bits stands for 128 MiB of disk.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from nbdstream.errors import LeafError, LeafFormatError
from nbdstream.extents import align_up
from nbdstream.leaf.base import (
    BackingReference,
    ColdMetadata,
    read_exactly,
    read_range,
    write_exactly,
)
from nbdstream.leaf.bits import bit_run, set_bits
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.pages import FULL_PAGE, PAGE_SIZE, ZERO_PAGE, PageCache, write_pages
from nbdstream.leaf.redo import Record, RedoLog

BLOCK_SIZE = 4096
BLOCK_SHIFT = 12
MIN_CLUSTER_SIZE = BLOCK_SIZE
MAX_CLUSTER_SIZE = 64 << 20

_STAMP_AT = PAGE_SIZE - 8  # where a header's page ends

_MAGIC = b"nbdsmap\n"
_VERSION = 1
_SLOTS = 2
FIRST_PAGE = _SLOTS  # the page number of the first page of bits
SPAN_SHIFT = BLOCK_SHIFT + 15  # log2 of the disk range that one page of bits stands for
SPAN = 1 << SPAN_SHIFT
_PAGE_SHIFT = 15  # log2 of the bits in a page
_BIT_MASK = (1 << _PAGE_SHIFT) - 1

# magic, version, length of the header with its strings, generation, disk size, block size,
# cluster size, backing size, lengths of URI, format and identity, CRC-32 of the whole header
# with this field zero; little-endian. The strings (UTF-8) follow.
_HEADER = struct.Struct("<8sIIQQIIQHHHxxI")


@dataclass(frozen=True)
class MapHeader:
    """What the map says of the leaf as a whole; sizes in bytes."""

    size: int
    cluster_size: int
    backing: BackingReference
    generation: int = 0

    def pack(self) -> bytes:
        """The header's page up to the stamp. Raises LeafError if the strings do not fit in."""
        strings = [
            text.encode() for text in (self.backing.uri, self.backing.format, self.backing.identity)
        ]
        length = _HEADER.size + sum(map(len, strings))
        if length > _STAMP_AT:
            room = _STAMP_AT - _HEADER.size
            raise LeafError(f"the backing's URI is too long: the map has room for {room} bytes")
        fields = (
            _MAGIC,
            _VERSION,
            length,
            self.generation,
            self.size,
            BLOCK_SIZE,
            self.cluster_size,
            self.backing.size,
            *map(len, strings),
        )
        checksum = zlib.crc32(b"".join([_HEADER.pack(*fields, 0), *strings]))
        return b"".join([_HEADER.pack(*fields, checksum), *strings]).ljust(_STAMP_AT, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> "MapHeader":
        """The header in a page. Raises LeafFormatError, saying what is wrong with it."""
        (magic, version, length, generation, size, block_size, cluster_size, backing_size,
         *lengths, checksum) = _HEADER.unpack_from(page)  # fmt: skip
        if magic != _MAGIC:
            raise LeafFormatError("bad magic")
        if version != _VERSION:
            raise LeafFormatError(f"version {version} is not known")
        if length != _HEADER.size + sum(lengths) or length > PAGE_SIZE:
            raise LeafFormatError(f"header length {length} is wrong")
        covered = page[: _HEADER.size - 4] + bytes(4) + page[_HEADER.size : length]
        if zlib.crc32(covered) != checksum:
            raise LeafFormatError("header checksum mismatch")
        if block_size != BLOCK_SIZE or not is_cluster_size(cluster_size) or size >= 1 << 63:
            raise LeafFormatError(f"sizes make no sense: {size}, {block_size}, {cluster_size}")
        strings = []
        position = _HEADER.size
        for text_length in lengths:
            strings.append(page[position : position + text_length])
            position += text_length
        try:
            uri, backing_format, identity = (text.decode() for text in strings)
        except UnicodeDecodeError as error:
            raise LeafFormatError("header strings are not UTF-8") from error
        backing = BackingReference(uri, backing_format, backing_size, identity)
        return cls(size, cluster_size, backing, generation)


# A page of bits to be changed, the first block, and how many blocks.
Claim = tuple[bytearray, int, int]


def is_cluster_size(value: int) -> bool:
    """Whether a raw leaf can fetch in units of ``value`` bytes."""
    return MIN_CLUSTER_SIZE <= value <= MAX_CLUSTER_SIZE and value & (value - 1) == 0


def create_map(path: str, header: MapHeader) -> None:
    """Make a new map without a bit set, durably. Raises LeafError, OSError."""
    page = header.pack()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, _file_length(header.size))
        # So that a full file system does not refuse a bit of data that it has taken.
        with suppress(OSError):
            os.posix_fallocate(fd, 0, _file_length(header.size))
        write_exactly(fd, memoryview(page), 0)
        Syncs(path).sync(fd)
    finally:
        os.close(fd)


def _file_length(size: int) -> int:
    return (FIRST_PAGE + align_up(size, SPAN) // SPAN) * PAGE_SIZE


def local_runs(path: str) -> list[tuple[int, int]]:
    """The (offset, end) of all that a map says is local (worker). It takes no lock: of a leaf in
    use, it tells what was durable a moment ago. Raises LeafFormatError, OSError."""
    allocation = AllocationMap(path, read_only=True)
    try:
        size, offset, found = allocation.header.size, 0, []
        while offset < size:
            try:
                for start, end, local in allocation.runs(offset, size - offset):
                    if local:
                        found.append((start, end))
                    offset = end
            except ColdMetadata as cold:
                cold.warm()
        return found
    finally:
        allocation.close()


class AllocationMap:
    """An open map. Ranges are guest bytes; all methods but those marked run in the loop.

    Attributes:
        fd: of the map file; closed by `close`.
        header: as last read or written.
        cache: the pages of bits, among them `FULL_PAGE` where all blocks are allocated.
    """

    def __init__(self, path: str, *, read_only: bool) -> None:
        """Open a map (may block). Raises LeafFormatError, OSError."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        self.fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            self.header = _read_header(self.fd, path)
        except BaseException:
            os.close(self.fd)
            raise
        self.cache = PageCache(self.fd)
        self._redo = RedoLog()

    def close(self) -> None:
        os.close(self.fd)

    def allocated(self, offset: int, length: int) -> bool:
        """Whether every block that the range touches is known, from memory, to be allocated."""
        last_byte = offset + length - 1
        span = offset >> SPAN_SHIFT
        if last_byte >> SPAN_SHIFT != span:
            middle = (span + 1) << SPAN_SHIFT
            rest = offset + length - middle
            return self.allocated(offset, middle - offset) and self.allocated(middle, rest)
        page = self.cache.pages.get(span + FIRST_PAGE)
        if page is FULL_PAGE:
            return True
        if page is None:
            return False
        first = (offset >> BLOCK_SHIFT) & _BIT_MASK
        last = (last_byte >> BLOCK_SHIFT) & _BIT_MASK
        if first == last:
            return page[first >> 3] >> (first & 7) & 1 == 1
        wanted = (1 << (last - first + 1)) - 1
        bits = int.from_bytes(page[first >> 3 : (last >> 3) + 1], "little") >> (first & 7)
        return bits & wanted == wanted

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Tile the range with (offset, end, allocated). Raises ColdMetadata."""
        position, end = offset, offset + length
        while position < end:
            span = position >> SPAN_SHIFT
            page = self.cache.pages.get(span + FIRST_PAGE, ZERO_PAGE)
            if page is ZERO_PAGE:  # not loaded, or nothing in it: skip as far as possible
                limit = ((end - 1) >> SPAN_SHIFT) + 1 + FIRST_PAGE
                used = self.cache.next_used(span + FIRST_PAGE, limit) - FIRST_PAGE
                if used > span:
                    stop = min(used << SPAN_SHIFT, end)
                    yield position, stop, False
                    position = stop
                    continue
                page = self.cache.load(span + FIRST_PAGE)
            first = (position >> BLOCK_SHIFT) & _BIT_MASK
            run, value = bit_run(page, first)
            stop = min((span << SPAN_SHIFT) + ((first + run) << BLOCK_SHIFT), end)
            yield position, stop, value
            position = stop

    def claim(self, offset: int, length: int) -> list[Claim]:
        """Get ready to mark the blocks that the range covers whole: hand over to `mark`.

        Changes nothing that can be seen. Raises ColdMetadata, FlushNeeded.
        """
        first = (offset + BLOCK_SIZE - 1) >> BLOCK_SHIFT
        end = offset + length
        # The disk's last block may be shorter than the others.
        stop = (end + BLOCK_SIZE - 1 if end == self.header.size else end) >> BLOCK_SHIFT
        claims = [
            (self.cache.writable((first >> _PAGE_SHIFT) + FIRST_PAGE), first, count)
            for first, count in _by_page(first, stop)
        ]
        self._redo.reserve(len(claims))
        return claims

    def mark(self, claims: list[Claim]) -> None:
        """Set the bits of claimed blocks."""
        for page, first, count in claims:
            set_bits(page, first & _BIT_MASK, count)
            self._redo.append(first, count)

    # -- the redo log ------------------------------------------------------------------

    def log_to(self, redo: RedoLog) -> None:
        """Record all changes in a redo log from now on."""
        self._redo = redo

    def stamp(self) -> int:
        """The stamp of the redo log, 0 if there is none (worker). Raises OSError."""
        return int.from_bytes(os.pread(self.fd, 8, _STAMP_AT), "little")

    def set_stamp(self, stamp: int) -> None:
        """Worker: write another stamp, not synced. Raises LeafError where a header of an older
        version takes its place, OSError."""
        self.header.pack()
        write_exactly(self.fd, memoryview(stamp.to_bytes(8, "little")), _STAMP_AT)

    def recover(self, records: list[Record], syncs: Syncs) -> None:
        """Worker: set the bits that a redo log has, in the file, and make them durable; the data
        is synced already. Raises LeafFormatError if they are not of this disk, OSError."""
        blocks = align_up(self.header.size, BLOCK_SIZE) // BLOCK_SIZE
        pages: dict[int, bytearray] = {}
        for start, length, _, _ in records:
            if start + length > blocks:
                raise LeafFormatError(f"block {start + length - 1} of {blocks}")
            for first, count in _by_page(start, start + length):
                number = (first >> _PAGE_SHIFT) + FIRST_PAGE
                if number not in pages:
                    pages[number] = bytearray(read_range(self.fd, number * PAGE_SIZE, PAGE_SIZE))
                set_bits(pages[number], first & _BIT_MASK, count)
        write_pages(self.fd, pages.items())
        syncs.sync(self.fd)

    def write_header(self, backing: BackingReference, syncs: Syncs) -> None:
        """Worker: record another backing, durably. Raises LeafError, OSError."""
        header = replace(self.header, backing=backing, generation=self.header.generation + 1)
        slot = header.generation % _SLOTS  # the older one: a torn write costs nothing
        write_exactly(self.fd, memoryview(header.pack()), slot * PAGE_SIZE)
        syncs.sync(self.fd)
        self.header = header

    def first_unallocated(self) -> int | None:
        """Worker: the lowest guest offset whose bit is not set in the *file*; None: all are.

        Raises OSError.
        """
        blocks = align_up(self.header.size, BLOCK_SIZE) // BLOCK_SIZE
        length = -(-blocks // 8)
        buffer = memoryview(bytearray(256 * PAGE_SIZE))
        for position in range(0, length, len(buffer)):
            piece = buffer[: min(len(buffer), length - position)]
            read_exactly(self.fd, piece, FIRST_PAGE * PAGE_SIZE + position)
            if blocks % 8 and position + len(piece) == length:
                piece[-1] |= 0xFF << blocks % 8 & 0xFF  # bits behind the disk's end
            run, value = bit_run(bytes(piece), 0)
            if not value:
                run = 0
            if run < len(piece) * 8:
                return (position * 8 + run) << BLOCK_SHIFT
        return None


def _by_page(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Blocks ``first`` to ``stop`` - 1 as (first, count), cut where pages of bits end."""
    while first < stop:
        page_stop = min((first | _BIT_MASK) + 1, stop)
        yield first, page_stop - first
        first = page_stop


def _read_header(fd: int, path: str) -> MapHeader:
    """The newer of the valid headers. Raises LeafFormatError with the trouble of both."""
    headers = []
    troubles = []
    for slot in range(_SLOTS):
        page = os.pread(fd, PAGE_SIZE, slot * PAGE_SIZE)
        try:
            headers.append(MapHeader.unpack(page.ljust(PAGE_SIZE, b"\0")))
        except LeafFormatError as error:
            troubles.append(str(error))
    if not headers:
        raise LeafFormatError(f"{path} is damaged, or not an allocation map: {troubles[0]}")
    header = max(headers, key=lambda header: header.generation)
    expected = _file_length(header.size)
    actual = os.fstat(fd).st_size
    if actual != expected:
        raise LeafFormatError(f"{path} is damaged: {actual} bytes long instead of {expected}")
    return header
