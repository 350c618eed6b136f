# SPDX-License-Identifier: Apache-2.0
"""A bounded cache of an image's metadata, in 4 KiB pages of the file.

Formats look their tables up in it and change them in it; the file sees a change only
when a flush writes its snapshot.

- A page in memory is ``bytes`` or ``bytearray``. Pages of zeroes and of ones are the
  shared `ZERO_PAGE` and `FULL_PAGE`: holes of a sparse table file cost neither memory
  nor a read, and ``page is FULL_PAGE`` is the fastest test there is.
- Only a page in ``_dirty`` is ever changed in place. A flush takes the dirty pages as
  they are and empties the set; a later change of such a page changes a copy.
  So a snapshot costs nothing, and never shows what came after it.
- Damaged parts of a page are zeroes in memory, and go to the file as they were there. Such a
  page stays in memory, so that it is not judged again when the file has grown.
- Dirty pages, and those of a flush under way, stay in memory; the others go in the order
  in which they came (the kernel's page cache has them still: fetching one back costs
  two system calls, less than what a precise LRU order would cost every request).
"""

from collections.abc import Callable, Iterable

from nbdstream.errors import LeafFormatError
from nbdstream.leaf import files
from nbdstream.leaf.base import FlushNeeded, write_exactly

PAGE_SIZE = 4096
ZERO_PAGE = bytes(PAGE_SIZE)
FULL_PAGE = b"\xff" * PAGE_SIZE

PRIVATE_PAGES = 8192  # pages with content of their own: 32 MiB
KNOWN_PAGES = 131072  # with the shared ones, which cost only their place in the table
DIRTY_PAGES = 2048  # more than that need a flush first
DAMAGED_PAGES = 1024  # that are lived with
WRITTEN_PAGES = 131072  # that are told apart from others


class PageCache:
    """The pages of one file, by page number (offset / 4096).

    Attributes:
        pages: what is in memory. The hot path looks here by itself.
        damaged: of pages with damaged parts, the place of each in the page and its bytes.
    """

    def __init__(
        self, fd: int, judge: Callable[[int, bytes], dict[int, bytes]] | None = None
    ) -> None:
        """``judge`` sees each page that comes from the file first, with its number, and
        returns its damaged parts: place and bytes."""
        self.damaged: dict[int, dict[int, bytes]] = {}
        self._written: set[int] = set()
        self._judge = judge
        self.pages: dict[int, bytes | bytearray] = {}
        self._fd = fd
        self._private = 0
        self._dirty: set[int] = set()
        self._flushing: dict[int, bytes | bytearray] = {}

    def load(self, number: int) -> bytes | bytearray:
        """The page, from memory or the kernel's page cache. Raises ColdMetadata."""
        page = self.pages.get(number)
        if page is None:
            page = self._fetch(number)
            self._make_room()
            self._put(number, page)
        return page

    def writable(self, number: int) -> bytearray:
        """The page, to be changed in place before the next flush begins.

        Raises ColdMetadata, FlushNeeded.
        """
        page = self.load(number)
        if number in self._dirty:
            assert isinstance(page, bytearray)
            return page
        if len(self._dirty) >= DIRTY_PAGES:
            raise FlushNeeded
        copy = bytearray(page)
        self._put(number, copy)
        self._dirty.add(number)
        if len(self._written) < WRITTEN_PAGES:
            self._written.add(number)
        return copy

    def written(self, number: int) -> bool:
        """Whether the page may have been changed since the file was opened."""
        return number in self._written or len(self._written) >= WRITTEN_PAGES

    def next_used(self, number: int, limit: int) -> int:
        """The first page from ``number`` on that may be other than zeroes; at most ``limit``."""
        data = files.next_data(self._fd, number * PAGE_SIZE)
        found = limit if data is None else min(data // PAGE_SIZE, limit)
        # What only memory has: changed pages that are still holes in the file.
        for pinned in (self._dirty, self._flushing):
            found = min((n for n in pinned if number <= n < found), default=found)
        return found

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    def begin_flush(self) -> dict[int, bytes | bytearray]:
        """The snapshot: pages that no longer change, by number."""
        self._flushing = {number: self._stored(number) for number in self._dirty}
        self._dirty = set()
        return self._flushing

    def end_flush(self, *, ok: bool) -> None:
        """The snapshot is durable; or not: then its pages are dirty again."""
        flushed, self._flushing = self._flushing, {}
        if not ok:
            # Where a page was changed since, that was done in a copy, which has both.
            self._dirty.update(flushed)
            return
        for number, page in flushed.items():
            if self.pages[number] is page:
                self._put(number, _shared(bytes(page)))

    def _fetch(self, number: int) -> bytes:
        offset = number * PAGE_SIZE
        data = files.next_data(self._fd, offset)
        if data is None or data >= offset + PAGE_SIZE:
            return ZERO_PAGE
        page = _shared(files.read_cached(self._fd, offset, PAGE_SIZE))
        if self._judge is not None and (damaged := self._judge(number, page)):
            if len(self.damaged) >= DAMAGED_PAGES:
                raise LeafFormatError(f"too many tables are damaged, that at {offset:#x} too")
            masked = bytearray(page)
            for at, content in damaged.items():
                masked[at : at + len(content)] = bytes(len(content))
            self.damaged[number] = damaged
            page = bytes(masked)
        return page

    def _stored(self, number: int) -> bytes | bytearray:
        """A page as it goes to the file."""
        page = self.pages[number]
        if number in self.damaged:
            page = bytearray(page)
            for at, content in self.damaged[number].items():
                page[at : at + len(content)] = content
        return page

    def _put(self, number: int, page: bytes | bytearray) -> None:
        old = self.pages.get(number, ZERO_PAGE)
        self._private += _is_private(page) - _is_private(old)
        self.pages[number] = page

    def _make_room(self) -> None:
        # The bounds on dirty pages are far below those on pages, so this ends.
        while self._private >= PRIVATE_PAGES or len(self.pages) >= KNOWN_PAGES:
            number = next(iter(self.pages))
            page = self.pages.pop(number)
            if number in self._dirty or number in self._flushing or number in self.damaged:
                self.pages[number] = page  # to the end of the queue
            else:
                self._private -= _is_private(page)


def write_pages(fd: int, pages: Iterable[tuple[int, bytes | bytearray]]) -> None:
    """Worker: write pages of a snapshot to the file. Raises OSError."""
    for number, page in sorted(pages, key=lambda item: item[0]):
        write_exactly(fd, memoryview(page), number * PAGE_SIZE)


def _is_private(page: bytes | bytearray) -> bool:
    return page is not ZERO_PAGE and page is not FULL_PAGE


def _shared(page: bytes) -> bytes:
    if page == FULL_PAGE:
        return FULL_PAGE
    return ZERO_PAGE if page == ZERO_PAGE else page
