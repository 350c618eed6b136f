# SPDX-License-Identifier: Apache-2.0
"""Decisions made from an input: how a target turns bytes into a structured scenario.

When the bytes are used up everything is 0, so a scenario ends early, and never fails.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Numbers at which things break.
_INTERESTING = (0, 1, 2, 7, 8, 9, 255, 256, 511, 512, 513, 4095, 4096, 65535, 65536)


class Source:
    """Reads an input from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that are still there."""
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        """The next bytes: at most ``length``."""
        start = self._at
        self._at = min(start + length, len(self._data))
        return self._data[start : self._at]

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def number(self, size: int) -> int:
        """An integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "big")

    def byte(self) -> int:
        """0 to 255."""
        return self.number(1)

    def flag(self) -> bool:
        """Yes or no."""
        return bool(self.byte() & 1)

    def below(self, limit: int) -> int:
        """0 to ``limit`` - 1."""
        return self.number((limit - 1).bit_length() // 8 + 1) % limit

    def choice(self, options: Sequence[T]) -> T:
        """One of these."""
        return options[self.byte() % len(options)]

    def integer(self, bits: int) -> int:
        """An integer of so many bits, often near one at which things break."""
        kind = self.byte()
        if kind < 64:
            value = kind
        elif kind < 128:
            value = _INTERESTING[kind % len(_INTERESTING)]
        elif kind < 192:
            value = (1 << (kind % 64)) + self.byte() % 3 - 1
        elif kind < 224:
            value = -(kind % 32) - 1
        else:
            value = self.number(bits // 8)
        return value & ((1 << bits) - 1)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """``data`` cut into pieces; whole if nothing says otherwise."""
        at = 0
        while at < len(data):
            length = self.byte() or len(data)
            yield data[at : at + length]
            at += length
