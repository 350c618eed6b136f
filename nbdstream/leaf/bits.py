# SPDX-License-Identifier: Apache-2.0
"""Runs of bits in a byte string, the least significant bit of a byte first.

Python has no loop that is fast enough for single bits; whole runs go at the speed of C.
"""

import re

_NOT_ONES = re.compile(rb"[^\xff]")
_NOT_ZEROES = re.compile(rb"[^\0]")


def bit_run(page: bytes | bytearray, first: int) -> tuple[int, bool]:
    """How many bits from ``first`` on are alike, and whether they are set."""
    value = page[first >> 3] >> (first & 7) & 1 == 1
    uniform = 0xFF if value else 0
    # The rest of the first byte, then whole bytes, then the last byte: in what differs
    # from the uniform byte, the lowest bit set ends the run.
    byte = (page[first >> 3] ^ uniform) >> (first & 7)
    if byte:
        return (byte & -byte).bit_length() - 1, value
    match = (_NOT_ONES if value else _NOT_ZEROES).search(page, (first >> 3) + 1)
    if match is None:
        return (len(page) << 3) - first, value
    byte = page[match.start()] ^ uniform
    return (match.start() << 3) + (byte & -byte).bit_length() - 1 - first, value


def set_bits(page: bytearray, first: int, count: int) -> int:
    """Set ``count`` bits; returns how many of them were not set before."""
    start, stop = first >> 3, (first + count + 7) >> 3
    old = int.from_bytes(page[start:stop], "little")
    new = old | ((1 << count) - 1) << (first & 7)
    page[start:stop] = new.to_bytes(stop - start, "little")
    return (new ^ old).bit_count()
