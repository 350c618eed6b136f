# SPDX-License-Identifier: Apache-2.0
"""Buffers that are used again: which, and how many."""

from nbdstream.disk.buffers import LEAST, MOST, Buffers


def test_a_buffer_comes_back_to_who_wants_one_of_its_length() -> None:
    buffers = Buffers()
    first = buffers.take(LEAST)
    buffers.give(first)
    assert buffers.take(2 * LEAST) is not first
    assert buffers.take(LEAST) is first
    assert buffers.take(LEAST) is not first


def test_small_ones_are_not_kept() -> None:
    buffers = Buffers()
    small = buffers.take(LEAST - 1)
    buffers.give(small)
    assert buffers.take(LEAST - 1) is not small


def test_what_is_kept_is_bounded() -> None:
    buffers = Buffers()
    piece = MOST // 4
    given = [bytearray(piece) for _ in range(6)]
    for buffer in given:
        buffers.give(buffer)
    back = [buffers.take(piece) for _ in range(6)]
    assert sum(any(buffer is one for one in given) for buffer in back) == 4
    buffers.give(given[0])
    buffers.clear()
    assert buffers.take(piece) is not given[0]
