# SPDX-License-Identifier: Apache-2.0
"""What is done to a damaged image by itself: opened, read, written, checked, repaired.

Only `REFUSALS` may come out of any of it. An image that is refused is left alone; each step
that fails is given up, and the next one is tried.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fuzz.images import BACKING_BYTE, Damage, Image
from fuzz.source import Source
from nbdstream.errors import NbdstreamError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    CheckResult,
    Leaf,
    State,
    read_exactly,
)
from testbed.leaves import drive, flush

REFUSALS = (NbdstreamError, OSError)
# How much of a disk is read, and how many extents are looked at, whatever its size says.
READ_MOST = 2 << 20
EXTENTS_MOST = 4096

T = TypeVar("T")


def read(leaf: Leaf, offset: int, length: int) -> bytes:
    """What a guest sees, over a backing of `BACKING_BYTE`. Raises `REFUSALS`."""
    result = memoryview(bytearray(length))
    found = drive(leaf, lambda: list(leaf.extents(offset, length)))
    at = offset
    for extent in found:
        assert extent.offset == at and extent.length > 0, found
        at = extent.end
        part = result[extent.offset - offset : extent.end - offset]
        if extent.state is State.UNALLOCATED:
            assert leaf.backing is not None
            part[:] = bytes([BACKING_BYTE]) * extent.length
        elif extent.state is not State.ZERO:
            leaf.read(extent, part)
    assert at == offset + length, found
    host = leaf.locate(offset, length)
    if host == ALL_ZERO:
        assert not any(result)
    elif host != SCATTERED:
        again = memoryview(bytearray(length))
        read_exactly(leaf.fd, again, host)
        assert again == result
    return bytes(result)


class Session:
    """One damaged image and what is done to it; ``outcome`` collects what came of it."""

    def __init__(self, image: Image, damage: Damage, path: Path) -> None:
        self._image = image
        self._damage = damage
        self._path = path
        self.outcome: list[object] = []

    def _try(self, step: Callable[[], T]) -> T | None:
        """Make a step; note how it was refused, and return None, if it was."""
        try:
            result = step()
        except REFUSALS as error:
            assert str(error), "an error without words"
            self.outcome.append((type(error).__name__, str(error)))
            return None
        self.outcome.append(result)
        return result

    def open(self, *, read_only: bool) -> Leaf | None:
        """The open image, or None."""
        try:
            leaf = open_leaf(str(self._path), read_only=read_only, format=self._image.format)
        except REFUSALS as error:
            assert str(error)
            self.outcome.append((type(error).__name__, str(error)))
            return None
        leaf.describe()
        return leaf

    def open_works(self) -> bool:
        """Whether the image can be opened for writing now."""
        leaf = self.open(read_only=False)
        if leaf is not None:
            leaf.close()
        return leaf is not None

    def look(self) -> None:
        """Open the image read-only; what no mutation touched is what it was."""
        leaf = self.open(read_only=True)
        if leaf is None:
            return
        try:
            self._read_places(leaf)
            self._try(lambda: self._walk(leaf))
            self._try(lambda: leaf.check(repair=False))
        finally:
            self._try(leaf.close)

    def _read_places(self, leaf: Leaf) -> None:
        image, damage = self._image, self._damage
        left = READ_MOST
        for place in image.places:
            length = min(place.length, leaf.size - place.offset, left)
            if length <= 0:
                break
            left -= length
            found = self._try(lambda at=place.offset, size=length: read(leaf, at, size))  # type: ignore[misc]
            self.outcome.pop()  # too long to be kept
            if found is not None and not damage.touches(place):
                wanted = image.content[place.offset : place.offset + length]
                assert found == wanted, f"the data at {place.offset} is not what it was"

    def _walk(self, leaf: Leaf) -> int:
        """Look at the extents of the whole disk, as far as the bound goes."""
        looked, offset = 0, 0
        while offset < leaf.size and looked < EXTENTS_MOST:
            length = min(256 << 20, leaf.size - offset)

            def some(at: int = offset, size: int = length) -> tuple[int, int]:
                number, end = 0, at
                for extent in leaf.extents(at, size):
                    assert extent.offset == end and extent.length > 0
                    number, end = number + 1, extent.end
                    if number > 256:
                        break
                return number, end

            number, offset = drive(leaf, some)
            looked += number
        return looked

    def work(self, source: Source) -> None:
        """Open the image for writing, and do to it what the input says; then close it."""
        leaf = self.open(read_only=False)
        if leaf is None:
            return
        try:
            for _ in range(source.byte() % 12 if leaf.size else 0):
                self._act(leaf, source)
            self._try(lambda: flush(leaf))
            self._try(lambda: leaf.check(repair=False))
        finally:
            self._try(leaf.close)
            leaf.close()  # a second time is allowed, and does nothing

    def _act(self, leaf: Leaf, source: Source) -> None:
        block = leaf.block_size
        offset = source.number(8) % leaf.size if source.byte() > 250 else source.number(3)
        offset = min(offset, leaf.size - 1) // block * block
        length = min((1 + source.byte() % 20) * block, leaf.size - offset, 1 << 20)
        kind = source.byte() % 6
        if kind < 3:
            length = min(length, 256 << 10)
            if offset + length < leaf.size:
                length = max(block, length // block * block)
            data = bytes([1 + source.byte() % 255]) * length
            self._try(lambda: self._write(leaf, offset, data))
        elif kind == 3:
            unmap = source.flag()
            self._try(lambda: drive(leaf, lambda: leaf.zero(offset, length, unmap=unmap)))
        elif kind == 4:
            self._try(lambda: flush(leaf))
        else:
            self._try(lambda: len(read(leaf, offset, length)))

    def _write(self, leaf: Leaf, offset: int, data: bytes) -> None:
        """Write whole blocks; clusters that are compressed are unpacked before."""
        size = leaf.cluster_size
        start, end = offset // size * size, min(-(-(offset + len(data)) // size) * size, leaf.size)
        found = drive(leaf, lambda: list(leaf.extents(start, end - start)))
        for extent in found:
            if extent.state is State.COMPRESSED:
                at = extent.offset // size * size
                old = read(leaf, at, min(size, leaf.size - at))
                drive(leaf, lambda at=at, old=old: leaf.write(at, memoryview(old)))  # type: ignore[misc]
        drive(leaf, lambda: leaf.write(offset, memoryview(data)))
        assert read(leaf, offset, len(data)) == data, "a write does not read back"

    def repair(self) -> None:
        """Check and repair; what is wholly repaired opens, and is clean."""
        leaf = self.open(read_only=False)
        if leaf is None:
            return
        result: CheckResult | None = None
        try:
            result = self._try(lambda: leaf.check(repair=True))
        finally:
            closed = self._try(lambda: leaf.close() or True)
        if result is None or not closed or result.repaired < result.errors + result.leaks:
            return
        again = open_leaf(str(self._path), read_only=True, format=self._image.format)
        try:
            left = again.check(repair=False)
            assert not left.errors and not left.leaks, f"after a repair: {left}"
        finally:
            again.close()
