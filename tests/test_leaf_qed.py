# SPDX-License-Identifier: Apache-2.0
"""QED leaves: the common suite, and what is their own."""

from pathlib import Path
from typing import Any

import pytest

from nbdstream.errors import LeafError, UsageError
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference
from testbed.peers import run
from tests.leaf_conformance import LeafConformance
from tests.leaf_model import model_test
from tests.leaf_support import (
    BACKING,
    ImageKind,
    by_qemu,
    ours,
)
from tests.qed_image import CLUSTER, header_of, small_image

path = pytest.fixture(small_image)

KINDS = [
    ours("qed"),
    ours("qed", 4096, size_most=256 << 30),
    # QEMU creates images with a table size of 1, but does not open them.
    by_qemu("qed", "cluster_size=4096,table_size=2", size_most=4 << 30),
    by_qemu("qed", "cluster_size=64k,table_size=16"),
    by_qemu("qed", "cluster_size=1M,table_size=2"),
]


class TestQed(LeafConformance):
    @pytest.fixture(params=KINDS, ids=str)
    def kind(self, request: Any) -> ImageKind:
        assert isinstance(request.param, ImageKind)
        return request.param


TestQedModel = model_test(ours("qed", 4096))
TestQedLargeClusterModel = model_test(by_qemu("qed", "cluster_size=64k,table_size=2"))


def test_a_size_is_rounded_up_to_whole_sectors(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    create_leaf(path, format="qed", size=1000, cluster_size=None, backing=None)
    leaf = open_leaf(path)
    assert leaf.size == 1024
    leaf.close()


def test_sizes_that_qed_cannot_have(tmp_path: Path) -> None:
    def create(size: int, cluster_size: int | None) -> None:
        create_leaf(
            str(tmp_path / "x"),
            format="qed",
            size=size,
            cluster_size=cluster_size,
            backing=BACKING,
        )

    for size, cluster_size in ((1 << 62, 4096), (1 << 20, 5000), (1 << 20, 2048)):
        with pytest.raises(UsageError):
            create(size, cluster_size)
    with pytest.raises(LeafError, match="1023 bytes"):
        create_leaf(
            str(tmp_path / "x"),
            format="qed",
            size=1 << 20,
            cluster_size=None,
            backing=BackingReference("nbd://" + "x" * 1024),
        )
    assert list(tmp_path.iterdir()) == []
    create(256 << 30, 4096)  # needs the largest tables there are
    assert header_of(tmp_path / "x").table_size == 16


def test_no_backing_is_dropped_while_it_is_needed(path: Path) -> None:
    leaf = open_leaf(str(path))
    with pytest.raises(LeafError, match=f"nothing at {3 * CLUSTER} yet"):
        leaf.drop_backing()
    assert leaf.backing is not None
    leaf.close()


def test_a_backing_of_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    run(["qemu-img", "create", "-q", "-f", "qed", "-u", "-b", "base.qcow2", "-F", "qcow2", path,
         "1M"])  # fmt: skip
    leaf = open_leaf(str(path))
    assert leaf.backing == BackingReference("base.qcow2", "")
    leaf.close()
