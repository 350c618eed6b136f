# SPDX-License-Identifier: Apache-2.0
"""Memory for payloads."""

import mmap

# From here on the memory comes from the system page by page, as the C library does it.
_MAPPED = 128 << 10


def new_buffer(length: int) -> memoryview:
    """Writable memory. A long one costs nothing before it is touched: a bytearray would be
    filled with zeroes at once, which for 32 MiB keeps the event loop busy for milliseconds,
    and for the buffers of an idle connection takes memory that it never needs."""
    if length < _MAPPED:
        return memoryview(bytearray(length))
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
