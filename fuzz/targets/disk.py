# SPDX-License-Identifier: Apache-2.0
"""Damaged images of every format under a disk with guests, a backing and a stream job.

Each request does what it says or fails with NbdstreamError or OSError; no task that serves
others ends because of it; the job completes, or pauses and says why.
"""

from collections.abc import Iterator

import trio
from trio.testing import MockClock

from fuzz.disk_drive import REFUSALS, serve
from fuzz.files import scratch
from fuzz.image_kinds import count, image
from fuzz.images import damaged
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.leaf import open_leaf

FORMATS = ("qcow2", "qed", "raw")


def run(data: bytes) -> object:
    source = Source(data)
    image_format = source.choice(FORMATS)
    base = image(image_format, source.byte())
    path = scratch(f"served.{image_format}")
    damaged(base, source, path)
    read_only = source.byte() % 4 == 0
    leaf = open_leaf(str(path), read_only=read_only, format=image_format)
    try:
        if not leaf.size:
            return None
        # Worker threads are real: the virtual clock gives them time to end.
        return trio.run(serve, leaf, source, clock=MockClock(autojump_threshold=0.02))
    finally:
        try:
            leaf.close()
        except REFUSALS as error:
            assert str(error)


def seeds() -> Iterator[bytes]:
    guest = bytes([0, 2, 0, 20, 0, 1, 7, 5, 0, 2, 0, 20, 0, 1, 0, 0, 0, 0, 16, 0, 1, 5, 1, 3])
    for number, image_format in enumerate(FORMATS):
        for kind in range(count(image_format)):
            for flag in (0, 1):
                yield bytes([number, kind, 0, 0, 1, flag, 2]) + guest * 3
            sites = len(image(image_format, kind).sites)
            for site in range(0, sites, 29):
                where = site.to_bytes(1 + (sites > 256), "big")
                yield bytes([number, kind, 1, 8 + site % 6, *where, 3, 1, 1, 1, 2]) + guest * 3


TARGET = Target(
    "disk",
    run,
    REFUSALS,
    seeds,
    seconds=20.0,
    memory=192 << 20,
    longest=256,
    examples=25,
    deterministic=False,  # threads
)
