# SPDX-License-Identifier: Apache-2.0
"""Power cuts: what a disk may have kept of what reached the kernel.

The journal that `tests.journal` recorded is replayed up to any point, the *cut*; of what
came after a file's last sync, any part may have survived:

- any subset of the changes, in any order, each torn at 512 bytes;
- file sizes likewise: a truncation is a change as any other;
- names (link, rename, unlink) likewise, until the directory is synced.

That is more than a real file system loses, so what passes here does not rest on how one
orders its writeback.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.journal import FailedSync, Journal, Name, Operation, Sync, Truncate, Write

SECTOR = 512


@dataclass
class _File:
    """A file at a cut: what is durable of it, and what may be."""

    durable: bytearray
    pending: list[Write | Truncate] = field(default_factory=list)

    def drop(self, rng: random.Random | None) -> None:
        """A sync fails: a part of what is pending becomes durable, and the rest is lost but
        for the length that it gave the file."""
        share = rng.choice((0, 0, 0.3, 0.7, 1)) if rng is not None else 0
        for change in [piece for whole in self.pending for piece in _torn(whole)]:
            if isinstance(change, Truncate) or (rng is not None and rng.random() < share):
                _apply(self.durable, change)
            else:
                end = change.offset + len(change.data)
                self.durable.extend(bytes(max(0, end - len(self.durable))))
        self.pending = []


class Disk:
    """What the disk holds of a journal, from cut to cut."""

    def __init__(self, journal: Journal, rng: random.Random | None = None) -> None:
        """``rng`` decides what failed syncs drop; without it, they drop everything."""
        self._rng = rng
        self._files = {inode: _File(bytearray(data)) for inode, data in journal.contents.items()}
        self._names: dict[str, int] = dict(journal.names)
        self._pending_names: list[Name] = []

    def advance(self, operation: Operation) -> None:
        """The next operation of the journal takes place before the power goes."""
        if isinstance(operation, Name):
            self._pending_names.append(operation)
            return
        if isinstance(operation, Sync | FailedSync) and operation.inode == 0:
            if isinstance(operation, Sync):
                _apply_names(self._names, self._pending_names)
                self._pending_names = []
            return  # names are no pages: a failure drops none of them
        target = self._files.setdefault(operation.inode, _File(bytearray()))
        if isinstance(operation, FailedSync):
            target.drop(self._rng)
        elif isinstance(operation, Sync):
            for change in target.pending:
                _apply(target.durable, change)
            target.pending = []
        else:
            target.pending.append(operation)

    def durable(self) -> dict[str, bytearray]:
        """The directory if nothing survived but what was synced, by file name."""
        return {
            name: bytearray(self._files[inode].durable)
            for name, inode in self._names.items()
            if inode in self._files
        }

    def survivors(self, rng: random.Random) -> dict[str, bytearray]:
        """One of the many states that the directory may be in, by file name."""
        keep = rng.choice(_STRATEGIES)
        names = dict(self._names)
        _apply_names(names, keep(list(self._pending_names), rng))
        return {
            name: self._left_of(self._files[inode], keep, rng)
            for name, inode in names.items()
            if inode in self._files
        }

    def _left_of(self, file: _File, keep: "Strategy", rng: random.Random) -> bytearray:
        content = bytearray(file.durable)
        pending: list[Any] = list(file.pending)
        if pending and keep is _keep_some and rng.random() < 0.5:
            pending = [piece for change in pending for piece in _torn(change)]
        for change in keep(pending, rng):
            _apply(content, change)
        return content


Strategy = Callable[[list[Any], random.Random], list[Any]]


def _keep_all(changes: list[Any], rng: random.Random) -> list[Any]:
    return changes


def _keep_none(changes: list[Any], rng: random.Random) -> list[Any]:
    return []


def _keep_some(changes: list[Any], rng: random.Random) -> list[Any]:
    share = rng.random()
    kept = [change for change in changes if rng.random() < share]
    rng.shuffle(kept)
    return kept


def _keep_one(changes: list[Any], rng: random.Random) -> list[Any]:
    return [rng.choice(changes)] if changes else []


def _lose_one(changes: list[Any], rng: random.Random) -> list[Any]:
    lost = rng.randrange(len(changes)) if changes else 0
    return changes[:lost] + changes[lost + 1 :]


def _keep_newest(changes: list[Any], rng: random.Random) -> list[Any]:
    return changes[rng.randrange(len(changes)) :] if changes else []


_STRATEGIES: tuple[Strategy, ...] = (
    _keep_all,
    _keep_none,
    _keep_some,
    _keep_some,
    _keep_some,
    _keep_one,
    _lose_one,
    _keep_newest,
)


def _torn(change: Write | Truncate) -> Iterator[Write | Truncate]:
    """A change in the pieces in which a disk may lose it."""
    if isinstance(change, Truncate):
        yield change
        return
    start = 0
    while start < len(change.data):
        stop = start + SECTOR - (change.offset + start) % SECTOR
        yield Write(change.inode, change.offset + start, change.data[start:stop])
        start = stop


def _apply(content: bytearray, change: Write | Truncate) -> None:
    if isinstance(change, Truncate):
        del content[change.size :]
        content.extend(bytes(change.size - len(content)))
        return
    if len(content) < change.offset:
        content.extend(bytes(change.offset - len(content)))
    content[change.offset : change.offset + len(change.data)] = change.data


def _apply_names(names: dict[str, int], changes: list[Name]) -> None:
    for change in changes:
        if change.inode is None:
            names.pop(change.name, None)
        else:
            names[change.name] = change.inode
