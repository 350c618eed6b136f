# SPDX-License-Identifier: Apache-2.0
"""Damaged QED images: header, backing name, L1 and L2 tables.

The rule and the steps are those of `fuzz.targets.qcow2`.
"""

from collections.abc import Iterator

from fuzz.target import Target
from fuzz.targets.qcow2 import exercise, seeds_of


def run(data: bytes) -> object:
    return exercise("qed", data)


def seeds() -> Iterator[bytes]:
    return seeds_of("qed")


TARGET = Target("qed", run, (), seeds, seconds=10.0, memory=192 << 20, longest=256, examples=40)
