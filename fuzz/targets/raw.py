# SPDX-License-Identifier: Apache-2.0
"""Damaged raw images: the allocation map's headers and bits.

The rule and the steps are those of `fuzz.targets.qcow2`.
"""

from collections.abc import Iterator

from fuzz.target import Target
from fuzz.targets.qcow2 import exercise, seeds_of


def run(data: bytes) -> object:
    return exercise("raw", data)


def seeds() -> Iterator[bytes]:
    return seeds_of("raw")


TARGET = Target("raw", run, (), seeds, seconds=10.0, memory=192 << 20, longest=256, examples=40)
