# SPDX-License-Identifier: Apache-2.0
"""The store and its register under power cuts: what a leaf needs is there, and registered.

A user's life with an image is recorded: each change of a name, and each sync. At each point of it
the power goes. A change of a name survives for certain once its directory was synced, and before
that it may survive or not, each change for itself. A file has what was synced last, or already what
came next. That is more than a real file system loses.
"""

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference
from nbdstream.store import files, register
from nbdstream.store.layout import Store
from nbdstream.store.register import UserState, join, users
from testbed.leaves import drive, flush

SIZE = 1 << 20
REFERENCE = BackingReference("nbd://far/image", "raw", SIZE, f"s1:{0:064x}")
VARIANTS = 8


@dataclass(frozen=True)
class Names:
    """Entries of directories that change in one step: (directory, name) to a file, or to none."""

    changes: dict[tuple[int, str], int | None]


@dataclass(frozen=True)
class SyncNames:
    directory: int


@dataclass(frozen=True)
class Content:
    """What a file has when it is synced."""

    file: int
    data: bytes
    attributes: dict[str, bytes]


@dataclass
class Journal:
    """``events``: changes, and the words of `say`."""

    top: Path
    before: dict[tuple[int, str], int] = field(default_factory=dict)
    directories: set[int] = field(default_factory=set)
    events: list[Names | SyncNames | Content | str] = field(default_factory=list)

    def say(self, word: str) -> None:
        self.events.append(word)

    def place(self, path: Any, directory: int | None = None) -> tuple[int, str] | None:
        """The directory and the name of a path; None outside of what is recorded."""
        parent = Path(path).parent
        if directory is not None:
            parent = Path(f"/proc/self/fd/{directory}").readlink() / parent
        if not (parent == self.top or self.top in parent.parents):
            return None
        return parent.stat().st_ino, Path(path).name

    def note(self, changes: dict[tuple[int, str] | None, int | None]) -> None:
        kept = {place: file for place, file in changes.items() if place is not None}
        if kept:
            self.events.append(Names(kept))

    def synced(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        status = os.fstat(fd)
        if self.top != path and self.top not in path.parents:
            return
        if stat.S_ISDIR(status.st_mode):
            self.events.append(SyncNames(status.st_ino))
            return
        attributes = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
        data = Path(f"/proc/self/fd/{fd}").read_bytes()
        self.events.append(Content(status.st_ino, data, attributes))


@contextmanager
def recorded(top: Path) -> Iterator[Journal]:
    """Record what happens below a directory; what is there now is durable."""
    journal = Journal(top)
    for path in [top, *top.rglob("*")]:
        if path.is_dir():
            journal.directories.add(path.stat().st_ino)
        if path != top:
            journal.before[path.parent.stat().st_ino, path.name] = path.stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        for name, wrap in _WRAPS.items():
            patch.setattr(os, name, wrap(journal, getattr(os, name)))
        yield journal


def _makes(journal: Journal, real: Callable[..., Any]) -> Callable[..., Any]:
    """open(2) with O_CREAT, and mkdir(2)."""

    def call(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> Any:
        known = isinstance(path, int) or os.path.lexists(path)
        done = real(path, *rest, dir_fd=dir_fd, **more)
        if not known and dir_fd is None and (place := journal.place(path)) is not None:
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                journal.directories.add(status.st_ino)
            journal.note({place: status.st_ino})
        return done

    return call


def _moves(journal: Journal, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(source: Any, target: Any) -> None:
        file = os.lstat(source).st_ino
        before = journal.place(source)
        real(source, target)
        journal.note({before: None, journal.place(target): file})

    return call


def _links(journal: Journal, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(source: Any, target: Any, **more: Any) -> None:
        real(source, target, **more)
        journal.note({journal.place(target): os.lstat(target).st_ino})

    return call


def _removes(journal: Journal, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *, dir_fd: int | None = None) -> None:
        place = journal.place(path, dir_fd)
        real(path, dir_fd=dir_fd)
        journal.note({place: None})

    return call


def _syncs(journal: Journal, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(fd: int) -> None:
        real(fd)
        journal.synced(fd)

    return call


_WRAPS: dict[str, Callable[[Journal, Callable[..., Any]], Callable[..., Any]]] = {
    "open": _makes,
    "mkdir": _makes,
    "rename": _moves,
    "replace": _moves,
    "link": _links,
    "unlink": _removes,
    "rmdir": _removes,
    "fsync": _syncs,
    "fdatasync": _syncs,
}


class Disk:
    """What is durable, and what may be, at a point of a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._names: dict[tuple[int, str], int | None] = dict(journal.before)
        self._pending: list[Names] = []
        self._contents: dict[int, Content] = {}

    def advance(self, event: Names | SyncNames | Content | str) -> None:
        if isinstance(event, Names):
            self._pending.append(event)
        elif isinstance(event, Content):
            self._contents[event.file] = event
        elif isinstance(event, SyncNames):
            wanted = [
                change
                for change in self._pending
                if any(directory == event.directory for directory, _ in change.changes)
            ]
            keep = _with_earlier(self._pending, wanted)
            for change in keep:
                self._names |= change.changes
            self._pending = [change for change in self._pending if change not in keep]

    def restore(self, later: list[Any], draw: random.Random, share: float) -> None:
        """Write it where the recording was made; of what is not durable, so much survives."""
        top = self._journal.top
        shutil.rmtree(top)
        chosen = [change for change in self._pending if draw.random() < share]
        names = dict(self._names)
        for change in _with_earlier(self._pending, chosen):
            names |= change.changes
        contents = dict(self._contents)
        for event in later:
            if isinstance(event, Content) and draw.random() < share:
                contents.setdefault(event.file, event)
        self._make(top, next(iter(self._journal.before))[0], names, contents)

    def _make(
        self,
        path: Path,
        directory: int,
        names: dict[tuple[int, str], int | None],
        contents: dict[int, Content],
    ) -> None:
        path.mkdir(mode=0o700)
        for (parent, name), file in names.items():
            if parent != directory or file is None:
                continue
            if file in self._journal.directories:
                self._make(path / name, file, names, contents)
                continue
            known = contents.get(file)
            with open(path / name, "wb") as made:
                if known is not None:
                    made.write(known.data.rstrip(b"\0"))
                    made.truncate(len(known.data))
            for key, value in known.attributes.items() if known is not None else ():
                os.setxattr(path / name, key, value)


def _with_earlier(pending: list[Names], wanted: list[Names]) -> list[Names]:
    """These changes, and those before them of the same names, in order."""
    touched: set[tuple[int, str]] = set()
    kept = []
    for change in reversed(pending):
        if change in wanted or touched & set(change.changes):
            touched |= set(change.changes)
            kept.append(change)
    return kept[::-1]


def live(top: Path, journal: Journal) -> None:
    """An image comes into the store, a guest uses it, pauses, uses it again, becomes whole; the
    image goes."""
    store, leaf = Store(top / "store"), str(top / "guests" / "leaf.raw")
    image = store.create(REFERENCE)
    membership = join(image, leaf, temporary=False)
    journal.say("joined")
    create_leaf(leaf, format="raw", size=SIZE, cluster_size=None, backing=REFERENCE)
    membership.pause()
    again = join(image, leaf, temporary=False)
    disk = open_leaf(leaf, format="raw")
    drive(disk, lambda: disk.zero(0, SIZE, unmap=True))
    flush(disk)
    disk.drop_backing()
    disk.close()
    journal.say("whole")
    again.leave()
    with image.lock():
        store.discard(image)


def check(top: Path, *, joined: bool, whole: bool) -> None:
    store, leaf = Store(top / "store"), top / "guests" / "leaf.raw"
    images = store.images()
    assert {path.name for path in (top / "store/images").iterdir()} == {each.id for each in images}
    for image in images:
        opened = open_leaf(str(image.leaf), read_only=True, format="raw")
        assert opened.backing is not None
        assert opened.backing.identity == image.record.identity
        opened.close()
    if joined and not whole:
        (image,) = images
        assert list(image.users.glob("*.json"))
    if leaf.exists() and Path(f"{leaf}.map").exists() and not whole:
        (image,) = images
        assert [(user.leaf, user.state) for user in users(image)] == [
            (str(leaf), UserState.WAITING)
        ]
    store.create(REFERENCE)  # and it goes on


@pytest.fixture
def top() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbds-", dir="/dev/shm") as name:
        yield Path(name) / "top"


def cut_everywhere(top: Path) -> int:
    """Live, and check all that each power cut may leave; how many were checked."""
    (top / "guests").mkdir(parents=True)
    Store(top / "store")
    with recorded(top) as journal:
        live(top, journal)
    disk, draw = Disk(journal), random.Random(1)
    told: set[str] = set()
    for number, event in enumerate(journal.events):
        disk.advance(event)
        if isinstance(event, str):
            told.add(event)
        for variant in range(VARIANTS):
            disk.restore(journal.events[number + 1 :], draw, variant / (VARIANTS - 1))
            check(top, joined="joined" in told, whole="whole" in told)
    return len(journal.events)


def test_the_register_is_right_after_a_power_cut_at_any_point(top: Path) -> None:
    assert cut_everywhere(top) > 40


def test_a_register_that_is_not_synced_is_found_out(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself: without the sync of the entry's name it fails."""
    monkeypatch.setattr(register, "sync_directory", lambda _path: None)
    monkeypatch.setattr(files, "sync_directory", lambda _path: None)
    with pytest.raises((AssertionError, ValueError)):
        cut_everywhere(top)
