# SPDX-License-Identifier: Apache-2.0
"""Power cuts at every point of a qcow2 leaf's life, and of its header being rewritten."""

import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.qcow2 import space
from testbed.leaves import flush
from tests.journal import recording
from tests.leaf_life import live
from tests.leaf_powercut import cut_everywhere
from tests.leaf_support import BACKING, ImageKind, by_qemu, ours, plain, qemu_check, zero
from tests.powercut import Disk


def recorded(kind: ImageKind) -> ImageKind:
    """The same, with the backing's identity recorded."""

    def make(path: Path, size: int, backing: BackingReference | None) -> None:
        leaf = kind.new(path, size, backing)
        assert backing is not None
        leaf.record_backing(backing)
        leaf.close()

    return replace(kind, make=make)


KINDS = [
    ours("qcow2"),
    ours("qcow2", 16384),
    plain(4096),
    recorded(by_qemu("qcow2", "refcount_bits=1,cluster_size=512")),
    recorded(by_qemu("qcow2", "compat=0.10,cluster_size=1k")),
]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of images are written to it.
    They grow in small steps, to be small."""
    monkeypatch.setattr(space, "GROWTH", 1 << 16)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as directory:
        for name in ("life", "cut"):
            (Path(directory) / name).mkdir()
        yield Path(directory)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("finish", [False, True], ids=["cut", "finish"])
def test_power_cut(kind: ImageKind, finish: bool, memory: Path) -> None:
    size = (1 << 20) + 512
    windows: tuple[tuple[int, int], ...] = ((0, 16 * 4096), ((1 << 20) - 8 * 4096, 8 * 4096 + 512))
    if finish:
        size = 64 * 1024
        windows = ((0, size),)
    life = live(kind, memory / "life", seed=3, size=size, windows=windows, steps=70, finish=finish)
    judged = cut_everywhere(life, memory / "cut", seed=3, variants=2)
    assert judged >= 2 * len(life.journal.operations)


@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "compat=0.10,cluster_size=1k", "cluster_size=4k", "cluster_size=512", ""],
)
def test_the_header_means_one_or_the_other(options: str, memory: Path) -> None:
    """Opening (which upgrades old images), recording backings of all lengths, dropping them:
    after a cut in between, the image names the former or the latter backing, whole."""
    path = memory / "life" / "disk"
    kind = by_qemu("qcow2", options or "cluster_size=64k")
    kind.make(path, 1 << 20, BACKING)
    room = 250 if "cluster_size=1k" in options or "=512" in options else 1023
    names = [BACKING.uri, "nbd://a/b", "nbd://" + "c" * (room - 6), "nbd://d", BACKING.uri, None]
    with recording(memory / "life") as journal:
        leaf = open_leaf(str(path), format="qcow2")
        marks = [len(journal.operations)]
        for name in names[1:]:
            if name is None:
                zero(leaf, 0, 1 << 20)
                flush(leaf)
                leaf.drop_backing()
            else:
                leaf.record_backing(BackingReference(name, "raw", 1 << 20, f"of {name[:9]}"))
            marks.append(len(journal.operations))
        leaf.close()
    rng = random.Random(1)
    disk = Disk(journal)
    for position, operation in enumerate([None, *journal.operations]):
        if operation is not None:
            disk.advance(operation)
        done = sum(mark <= position for mark in marks)
        allowed = {names[max(0, done - 1)], names[min(done, len(names) - 1)]}
        for _ in range(12):
            target = memory / "cut" / "disk"
            target.write_bytes(disk.survivors(rng)["disk"])
            leaf = open_leaf(str(target), read_only=True, format="qcow2")
            found = leaf.backing
            leaf.close()
            assert (found.uri if found else None) in allowed, position
            if found is not None and found.identity:
                assert found.identity == f"of {found.uri[:9]}"
    qemu_check(path, "qcow2")
