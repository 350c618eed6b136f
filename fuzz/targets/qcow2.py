# SPDX-License-Identifier: Apache-2.0
"""Damaged qcow2 images: header, extensions, L1, L2, refcounts, subclusters, compressed clusters.

Opened, read, written, checked and repaired; only NbdstreamError and OSError come out, and data
that the damage does not touch stays what it was.
"""

from collections.abc import Iterator

from fuzz.drive import Session
from fuzz.files import scratch
from fuzz.image_kinds import count, image
from fuzz.images import damaged
from fuzz.source import Source
from fuzz.target import Target


def exercise(image_format: str, data: bytes) -> object:
    """One input for a target of a leaf format."""
    source = Source(data)
    base = image(image_format, source.byte())
    path = scratch(f"disk.{image_format}")
    damage = damaged(base, source, path)
    session = Session(base, damage, path)
    session.look()
    steps = source.byte()
    if steps & 1:
        session.work(source)
    if steps & 2:
        session.repair()
    if steps & 4:
        session.work(source)
    if not damage.ranges and not damage.everywhere and base.writable:
        assert session.open_works(), session.outcome
    return session.outcome


def seeds_of(image_format: str) -> Iterator[bytes]:
    """For each image: undamaged, and a few of its sites changed."""
    for number in range(count(image_format)):
        base = image(image_format, number)
        work = bytes([7, 6]) + bytes([0, 0, 0, 1, 2, 0, 9, 0, 0, 0, 5, 3, 3, 1]) * 3
        yield bytes([number, 0]) + work
        yield bytes([number, 0, 0, 2])
        for site in range(0, len(base.sites), 17):
            yield (
                bytes([number, 1, 8 + site % 6, *site.to_bytes(1 + (len(base.sites) > 256), "big")])
                + bytes([site % 64, 1])
                + work
            )


def run(data: bytes) -> object:
    return exercise("qcow2", data)


def seeds() -> Iterator[bytes]:
    return seeds_of("qcow2")


TARGET = Target("qcow2", run, (), seeds, seconds=10.0, memory=192 << 20, longest=256, examples=40)
