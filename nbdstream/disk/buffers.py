# SPDX-License-Identifier: Apache-2.0
"""Buffers for large fetches, used again: a fresh one costs a pass over its memory each time."""

from collections import defaultdict

# Smaller ones are cheap to make, and of many sizes.
LEAST = 128 << 10
# Bytes that are kept: what the largest window has under way.
MOST = 64 << 20


class Buffers:
    """Those that are not in use, by length."""

    def __init__(self) -> None:
        self._spare: dict[int, list[bytearray]] = defaultdict(list)
        self._kept = 0

    def take(self, length: int) -> bytearray:
        """A buffer with any content."""
        spare = self._spare.get(length)
        if not spare:
            return bytearray(length)
        self._kept -= length
        return spare.pop()

    def give(self, buffer: bytearray) -> None:
        """The buffer will not be read or written any more."""
        if len(buffer) >= LEAST and self._kept + len(buffer) <= MOST:
            self._kept += len(buffer)
            self._spare[len(buffer)].append(buffer)

    def clear(self) -> None:
        """Forget them all: nothing is under way."""
        self._spare.clear()
        self._kept = 0
