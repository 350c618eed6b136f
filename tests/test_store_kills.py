# SPDX-License-Identifier: Apache-2.0
"""The store and its register under kills: processes that die at any system call.

Each step of a random history is made by a process of its own (a fork), which may be killed by
SIGKILL at its n-th system call that changes something. The kernel then drops its locks, as it
does in earnest. What must hold after each step: an image that is in use is there, whole,
and its user is in the register; whatever is there can be opened; and what is not in use can be
removed.
"""

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbdstream.errors import ImageGoneError, StoreError
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference
from nbdstream.store.layout import Image, Store
from nbdstream.store.register import UserState, join, users
from nbdstream.store.upkeep import prune, remove
from testbed.leaves import drive, flush
from testbed.peers import temporary_directory

MIB = 1 << 20
SIZE = MIB
URI = "nbd://far/image"
# Calls at which a process may be killed: just before it makes the call.
CALLS = ("open", "rename", "replace", "unlink", "mkdir", "rmdir", "fsync", "utime", "link")
NEVER = 1 << 30
# More than any step makes.
CALLS_MOST = 60

versions = st.integers(0, 1)
leaves = st.integers(0, 2)
kill_at = st.one_of(st.just(NEVER), st.integers(0, CALLS_MOST))


def reference(version: int) -> BackingReference:
    return BackingReference(URI, "raw", SIZE, f"s1:{version:064x}")


def dying(number: int) -> None:
    """From now on, kill this process at its `number`-th call."""
    left = number

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    fcntl.fcntl = wrapped(fcntl.fcntl)


def make_whole(path: str) -> None:
    """Complete a leaf, and have it let go of its backing."""
    leaf = open_leaf(path, format="raw")
    drive(leaf, lambda: leaf.zero(0, SIZE, unmap=True))
    flush(leaf)
    leaf.drop_backing()
    leaf.close()


@dataclass
class Process:
    """A forked process: says on a pipe how far it is, and waits for an order on another."""

    pid: int
    words: int
    orders: int
    alive: bool = True

    def order(self, text: bytes) -> bytes:
        os.write(self.orders, text)
        return self.end()

    def end(self) -> bytes:
        """Wait for its end; the last thing that it said."""
        said = b""
        while part := os.read(self.words, 4096):
            said = part
        os.waitpid(self.pid, 0)
        os.close(self.words)
        os.close(self.orders)
        self.alive = False
        return said

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.end()


def forked(work: Callable[[Callable[[bytes], None], Callable[[], bytes]], None]) -> Process:
    """Run `work(say, wait)` in a process of its own."""
    words, say = os.pipe()
    wait, orders = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(words)
            os.close(orders)
            work(lambda text: (os.write(say, text), None)[1], lambda: os.read(wait, 16))
            status = 0
        except BaseException as error:
            os.write(say, repr(error).encode())
        finally:
            os._exit(status)
    os.close(say)
    os.close(wait)
    return Process(pid, words, orders)


class StoreUnderKills(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="nbds-", dir="/dev/shm"))
        self.store = Store(self.directory / "store")
        self.running: dict[int, Process] = {}  # by leaf
        self.version: dict[int, int] = {}  # the version that each leaf's user has joined

    def teardown(self) -> None:
        for process in self.running.values():
            process.kill()
        shutil.rmtree(self.directory)

    def leaf(self, number: int) -> Path:
        return self.directory / f"leaf{number}.raw"

    def image(self, version: int) -> Image | None:
        return self.store.find(URI, reference(version).identity)

    def is_partial(self, number: int) -> bool:
        return self.leaf(number).exists() and Path(f"{self.leaf(number)}.map").exists()

    def needed(self) -> set[tuple[int, int]]:
        """The (version, leaf) pairs that must not be lost."""
        return {
            (version, number)
            for number, version in self.version.items()
            if number in self.running or self.is_partial(number)
        }

    # -- steps ---------------------------------------------------------------------------

    @rule(version=versions, at=kill_at)
    def create(self, version: int, at: int) -> None:
        def work(_say: Callable[[bytes], None], _wait: Callable[[], bytes]) -> None:
            dying(at)
            self.store.create(reference(version))

        said = forked(work).end()
        assert said == b"", said
        if at == NEVER:
            assert self.image(version) is not None

    @rule(version=versions, number=leaves, at=kill_at)
    def start(self, version: int, number: int, at: int) -> None:
        """A guest's server: joins, makes its leaf if there is none, and runs."""
        image = self.image(version)
        taken = self.version.get(number, version)
        if image is None or number in self.running:
            return
        if self.leaf(number).exists() and (taken != version or not self.is_partial(number)):
            return
        leaf = str(self.leaf(number))

        def work(say: Callable[[bytes], None], wait: Callable[[], bytes]) -> None:
            dying(at)
            membership = join(image, leaf, temporary=False)
            if not os.path.lexists(leaf):
                create_leaf(
                    leaf, format="raw", size=SIZE, cluster_size=None, backing=reference(version)
                )
            say(b"running")
            if wait() == b"complete":
                make_whole(leaf)
                membership.leave()
            else:
                membership.pause()

        process = forked(work)
        said = os.read(process.words, 4096)
        if said == b"running":
            self.running[number] = process
            self.version[number] = version
        else:
            assert said == b"", said
            process.end()
            if self.leaf(number).exists():
                self.version[number] = version

    @precondition(lambda self: self.running)
    @rule(pick=st.randoms(use_true_random=False), how=st.sampled_from(["kill", "stop", "complete"]))
    def end(self, pick: Any, how: str) -> None:
        number = pick.choice(sorted(self.running))
        process = self.running.pop(number)
        if how == "kill":
            process.kill()
        else:
            said = process.order(how.encode())
            assert said in (b"", b"running"), said

    @rule(number=leaves)
    def delete_leaf(self, number: int) -> None:
        if number not in self.running:
            for path in (self.leaf(number), Path(f"{self.leaf(number)}.map")):
                path.unlink(missing_ok=True)
            self.version.pop(number, None)

    @rule(version=versions, at=kill_at)
    def remove(self, version: int, at: int) -> None:
        image = self.image(version)
        if image is None:
            return
        may_go = not any(needed == version for needed, _ in self.needed())

        def work(say: Callable[[bytes], None], _wait: Callable[[], bytes]) -> None:
            dying(at)
            try:
                trio.run(remove, self.store, image)
            except StoreError:
                say(b"refused")

        said = forked(work).end()
        assert said in (b"", b"refused"), said
        if not may_go:
            assert self.image(version) is not None
        elif at == NEVER:
            assert said == b""
            assert self.image(version) is None

    @rule(at=kill_at)
    def prune(self, at: int) -> None:
        def work(_say: Callable[[bytes], None], _wait: Callable[[], bytes]) -> None:
            dying(at)
            trio.run(prune, self.store, 0)

        said = forked(work).end()
        assert said == b"", said

    @rule()
    def reboot(self) -> None:
        for process in self.running.values():
            process.kill()
        self.running.clear()

    # -- what must hold ------------------------------------------------------------------

    @invariant()
    def what_is_needed_is_there(self) -> None:
        for version, number in self.needed():
            image = self.image(version)
            assert image is not None, f"version {version}, leaf {number}"
            found = {user.leaf: user.state for user in users(image)}
            expected = UserState.RUNNING if number in self.running else UserState.WAITING
            assert found[str(self.leaf(number))] is expected

    @invariant()
    def what_is_there_is_whole(self) -> None:
        for image in self.store.images():
            leaf = open_leaf(str(image.leaf), read_only=True, format="raw")
            try:
                assert leaf.backing is not None
                assert leaf.backing.identity == image.record.identity
            finally:
                leaf.close()
        names = {path.name for path in (self.store.root / "images").iterdir()}
        assert names == {image.id for image in self.store.images()}


StoreUnderKills.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_images_that_are_needed_survive_kills_at_any_system_call = pytest.mark.timeout(300)(
    StoreUnderKills.TestCase
)


def test_a_user_that_comes_while_an_image_is_removed_is_told(tmp_path: Path) -> None:
    with temporary_directory() as directory:
        store = Store(directory / "store")
        image = store.create(reference(0))
        trio.run(remove, store, image)
        with pytest.raises(ImageGoneError):
            join(image, str(tmp_path / "leaf.raw"), temporary=False)
        with suppress(FileNotFoundError):
            assert list(image.directory.iterdir()) == []
