# SPDX-License-Identifier: Apache-2.0
"""Which backing an image needs, told without a lock."""

from pathlib import Path

import pytest

from nbdstream.errors import LeafError
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.peek import backing_of
from testbed.leaves import drive, flush

SIZE = 1 << 20
REFERENCE = BackingReference("nbd://far/image", "raw", SIZE, f"s1:{1:064x}")


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qed"])
def test_a_look_is_in_no_ones_way_and_sees_the_end_of_the_need(
    tmp_path: Path, image_format: str
) -> None:
    path = str(tmp_path / f"leaf.{image_format}")
    create_leaf(path, format=image_format, size=SIZE, cluster_size=None, backing=REFERENCE)
    leaf = open_leaf(path)
    assert backing_of(path) == REFERENCE
    drive(leaf, lambda: leaf.zero(0, SIZE, unmap=True))
    flush(leaf)
    leaf.drop_backing()
    leaf.close()
    assert backing_of(path) is None


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "leaf.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(4092))
    with pytest.raises(LeafError):
        backing_of(str(path))
