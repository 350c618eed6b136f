# SPDX-License-Identifier: Apache-2.0
"""Power cuts at every point of a leaf's life: thousands of images, each opened and judged."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaf_life import live
from tests.leaf_powercut import cut_everywhere, fail_each_sync
from tests.leaf_support import ImageKind, by_qemu, ours

QED_SMALL_TABLES = by_qemu("qed", "cluster_size=4096,table_size=2")
KINDS = [
    ours("raw"),
    ours("raw", 4096),
    ours("qed", 4096),
    QED_SMALL_TABLES,
    ours("qcow2"),
    by_qemu("qcow2", "cluster_size=512,refcount_bits=1"),
    by_qemu("qcow2", "cluster_size=4096"),
    by_qemu("qcow2", "cluster_size=16k,extended_l2=on"),
    by_qemu("qcow2", "cluster_size=4096,compat=0.10"),
]
VARIANTS = 3  # of what may be left, at each point


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of images are written to it."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as directory:
        for name in ("life", "cut"):
            (Path(directory) / name).mkdir()
        yield Path(directory)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("finish", [False, True], ids=["cut", "finish"])
def test_power_cut(kind: ImageKind, finish: bool, memory: Path) -> None:
    """``windows`` are whole blocks of every kind."""
    # Both ends of the disk, which meet where the first L2 table of the smallest QED ends.
    size = (4 << 20) + 8 * 4096 + 512
    windows: tuple[tuple[int, int], ...] = (
        (0, 16 * 4096),
        ((4 << 20) - 8 * 4096, 16 * 4096 + 512),
    )
    if finish:
        size = 256 * 1024
        windows = ((0, size),)
    life = live(kind, memory / "life", seed=1, size=size, windows=windows, steps=120, finish=finish)
    judged = cut_everywhere(life, memory / "cut", seed=1, variants=VARIANTS)
    assert judged > VARIANTS * len(life.journal.operations) > 300


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("finish", [False, True], ids=["stop", "finish"])
def test_each_sync_fails_once(kind: ImageKind, finish: bool, memory: Path) -> None:
    """The kernel drops what a failed sync did not write, and the next sync succeeds: no
    flushed write is lost, and no cluster is exposed whose data was dropped."""
    failed = fail_each_sync(
        kind, memory / "life", memory / "cut", seed=5, finish=finish, variants=6
    )
    assert failed >= 10
