# SPDX-License-Identifier: Apache-2.0
"""Finding zeroes in data, fast enough to look at everything that is streamed."""

import functools
from collections.abc import Iterator


@functools.lru_cache(maxsize=16)
def zeroes(length: int) -> bytes:
    """A run of ``length`` zero bytes (shared; only a few lengths are ever asked for)."""
    return bytes(length)


def is_zero(view: memoryview) -> bool:
    """Whether all bytes are zero.

    Real data betrays itself in its first bytes; only what does not is compared as a
    whole, by memcmp.
    """
    head = view[:128].tobytes()
    return head == zeroes(len(head)) and view.tobytes() == zeroes(len(view))


def zero_runs(view: memoryview, granularity: int) -> Iterator[tuple[int, int, bool]]:
    """Cut data into alternating runs of zero and non-zero pieces.

    Yields (start, length, zero) relative to the view, pieces being ``granularity`` bytes
    (the last one may be shorter); neighbouring pieces of a kind come as one run.
    """
    start = position = 0
    kind: bool | None = None
    while position < len(view):
        zero = is_zero(view[position : position + granularity])
        if kind is not None and zero != kind:
            yield start, position - start, kind
            start = position
        kind = zero
        position = min(position + granularity, len(view))
    if kind is not None:
        yield start, position - start, kind
