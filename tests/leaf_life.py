# SPDX-License-Identifier: Apache-2.0
"""A leaf's busy life, with the journal of what it did to its files.

A life is what a streamed disk may do to its leaf, drawn at random: guest writes, fetched
clusters, zeroes, flushes that overlap with changes, full disks, failed syncs. Each change
and each completed flush is noted with its place in the journal.
"""

import functools
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from nbdstream.leaf.base import ColdMetadata, FlushNeeded, Leaf, State, SyncError, flushing
from testbed.leaves import drive
from tests.journal import Journal, recording
from tests.leaf_support import (
    BACKING,
    SECTOR,
    ImageKind,
    extents,
    pattern,
)

ZEROES = bytes(SECTOR)
NOTHING = bytes(32768)


@dataclass(frozen=True)
class Change:
    """From here in the journal on, these sectors may hold this content."""

    position: int
    first: int
    contents: tuple[bytes, ...]


@dataclass(frozen=True)
class Flushed:
    """At ``position`` of the journal a flush had completed that covers the first
    ``covered`` changes."""

    position: int
    covered: int


@dataclass
class Life:
    """What a leaf went through, with the journal of what that did to its files."""

    kind: ImageKind
    size: int
    windows: tuple[tuple[int, int], ...]
    journal: Journal
    identified: bool = False  # whether the backing's identity was known from the start
    changes: list[Change] = field(default_factory=list)
    flushes: list[Flushed] = field(default_factory=list)


@functools.cache
def backing_of(size: int) -> bytes:
    """The backing's content: sectors of version 0."""
    return pattern(0, size)


class Player:
    """Does at random to a leaf what a disk does, and takes notes."""

    def __init__(self, life: Life, leaf: Leaf, rng: random.Random, path: Path) -> None:
        self.life = life
        self.leaf = leaf
        self.rng = rng
        self.path = path
        self.version = 0
        self.backing = backing_of(life.size)

    def note(self, offset: int, data: bytes) -> None:
        contents = tuple(data[at : at + SECTOR] for at in range(0, len(data), SECTOR))
        position = len(self.life.journal.operations)
        self.life.changes.append(Change(position, offset // SECTOR, contents))

    def some_blocks(self) -> tuple[int, int]:
        """A range of whole blocks within one of the windows."""
        unit = self.leaf.block_size
        start, length = self.rng.choice(self.life.windows)
        blocks = -(-length // unit)
        first = self.rng.randrange(blocks)
        count = min(self.rng.choice((1, 1, 2, 3, 7)), blocks - first)
        offset = start + first * unit
        return offset, min(count * unit, self.life.size - offset)

    def plain_call(self) -> None:
        """One call that changes the leaf; or ColdMetadata, FlushNeeded, and then none."""
        changes = len(self.life.changes)
        try:
            self.change_something()
        except (ColdMetadata, FlushNeeded):
            del self.life.changes[changes:]
            raise

    def change_something(self) -> None:
        offset, length = self.some_blocks()
        kind = self.rng.choice(("write", "write", "write", "fetch", "patch", "zero", "discard"))
        if kind == "fetch":
            self.fetch(offset, length)
        elif kind == "write":
            self.version += 1
            data = pattern(offset, length, self.version)
            self.note(offset, data)
            self.leaf.write(offset, memoryview(data))
        elif kind == "patch":
            self.patch(offset, length)
        else:
            self.note(offset, bytes(length))
            self.leaf.zero(offset, length, unmap=kind == "discard")

    def fetch(self, offset: int, length: int) -> None:
        """Copy on read: the backing's content, where the leaf has nothing yet."""
        for extent in self.leaf.extents(offset, length):
            if extent.state is State.UNALLOCATED:
                data = self.backing[extent.offset : extent.end]
                self.note(extent.offset, data)
                self.leaf.write(extent.offset, memoryview(data))
                break  # one change a call

    def patch(self, offset: int, length: int) -> None:
        """A small write into data that is there already."""
        sectors = length // SECTOR
        first = self.rng.randrange(sectors)
        at = offset + first * SECTOR
        size = min(self.rng.choice((1, 3)), sectors - first) * SECTOR
        if all(extent.state is State.DATA for extent in self.leaf.extents(at, size)):
            self.version += 1
            data = pattern(at, size, self.version)
            self.note(at, data)
            self.leaf.write(at, memoryview(data))

    def fail(self) -> None:
        """A write to what the leaf does not have, on a disk that is about to be full: for
        the guest, nothing happens."""
        offset, length = self.some_blocks()
        if any(e.state is not State.UNALLOCATED for e in extents(self.leaf, offset, length)):
            return
        self.version += 1
        data = memoryview(pattern(offset, length, self.version))
        self.life.journal.room = self.rng.randrange(length)
        try:
            self.leaf.write(offset, data)
            raise AssertionError("the write succeeded on a full disk")
        except (ColdMetadata, FlushNeeded, OSError):
            pass
        finally:
            self.life.journal.room = None

    def interrupt(self) -> None:
        """What the event loop may do while a flush is under way in a worker."""
        if self.rng.random() < 0.4:
            try:
                self.plain_call()
            except (ColdMetadata, FlushNeeded):
                pass  # the disk would wait for the flush to end

    def step(self) -> None:
        action = self.rng.random()
        if action < 0.70:
            self.attempt()
        elif action < 0.75:
            self.fail()
        elif action < 0.93:
            self.flush()
        elif action < 0.96:
            self.version += 1
            self.flush()
            self.leaf.record_backing(replace(BACKING, identity=f"version {self.version}"))
        else:
            self.reopen()

    def attempt(self) -> None:
        while True:
            try:
                return self.plain_call()
            except ColdMetadata as cold:
                cold.warm()
            except FlushNeeded:
                self.flush()

    def flush(self) -> None:
        journal = self.life.journal
        covered = len(self.life.changes)
        with flushing(self.leaf) as finish:
            journal.interrupt = self.interrupt
            try:
                finish()
            finally:
                journal.interrupt = None
        self.life.flushes.append(Flushed(len(journal.operations), covered))

    def reopen(self) -> None:
        journal = self.life.journal
        covered = len(self.life.changes)
        self.leaf.close()
        self.life.flushes.append(Flushed(len(journal.operations), covered))
        self.leaf = self.life.kind.open(self.path)

    def finish(self) -> None:
        """The stream ends: everything becomes allocated, and the backing is dropped."""
        unit = self.leaf.cluster_size
        while missing := [e for e in extents(self.leaf) if e.state is State.UNALLOCATED]:
            for extent in missing:
                drive(self.leaf, partial(self.fetch, extent.offset, min(unit, extent.length)))
        self.flush()
        self.leaf.drop_backing()

    def go_on(self) -> None:
        """After a failed sync: the guest goes on, and so do those who ask for durability;
        none of them gets it, and the leaf closes."""
        for _ in range(12):
            try:
                self.plain_call()
            except ColdMetadata as cold:
                cold.warm()
            except FlushNeeded:
                break
        for refused in (
            self.flush,
            lambda: self.leaf.record_backing(replace(BACKING, identity="never")),
            self.leaf.drop_backing,
            self.flush,
            self.leaf.close,
        ):
            before = len(self.life.journal.operations)
            with pytest.raises(SyncError):
                refused()
            assert len(self.life.journal.operations) == before, "nothing is written or synced"
        assert self.leaf.fd < 0, "the file is closed"


def live(
    kind: ImageKind,
    directory: Path,
    *,
    seed: int,
    size: int,
    windows: tuple[tuple[int, int], ...],
    steps: int,
    finish: bool = False,
) -> Life:
    """Let a new leaf live through ``steps`` random actions, all within ``windows``, ranges of
    whole blocks; with ``finish``, to the end of its stream."""
    path = directory / "disk"
    kind.make(path, size, BACKING)
    with recording(directory) as journal:
        life = Life(kind, size, windows, journal)
        leaf = kind.open(path)
        life.identified = leaf.backing is not None and leaf.backing.identity != ""
        player = Player(life, leaf, random.Random(seed), path)
        for _ in range(steps):
            player.step()
        if finish:
            player.finish()
        player.leaf.close()
    return life
