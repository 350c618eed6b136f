# SPDX-License-Identifier: Apache-2.0
"""The qcow2 leaf: the common suite over every kind of image."""

from pathlib import Path
from typing import Any

import pytest

from nbdstream.leaf.qcow2 import tables
from tests.leaf_conformance import LeafConformance
from tests.leaf_model import model_test
from tests.leaf_support import ImageKind, by_qemu, ours, plain

KINDS = [
    ours("qcow2"),
    ours("qcow2", 512, size_most=128 << 30),
    ours("qcow2", 16384),
    ours("qcow2", 2 << 20),
    plain(65536),
    by_qemu("qcow2", "compat=0.10"),
    by_qemu("qcow2", "compat=1.1,cluster_size=4k"),
    by_qemu("qcow2", "extended_l2=on,lazy_refcounts=on"),
    by_qemu("qcow2", "refcount_bits=1,cluster_size=1k", size_most=64 << 30),
    by_qemu("qcow2", "refcount_bits=64,cluster_size=1k", size_most=64 << 30),
]


class TestQcow2(LeafConformance):
    @pytest.fixture(params=KINDS, ids=str)
    def kind(self, request: Any) -> ImageKind:
        assert isinstance(request.param, ImageKind)
        return request.param

    def test_dirty_metadata_is_bounded(self, kind: ImageKind, path: Path) -> None:
        # Tables of large clusters are few, of small ones small: none would reach the bound.
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(tables, "DIRTY_BYTES", 512 << 10)
            super().test_dirty_metadata_is_bounded(kind, path)


TestExtendedModel = model_test(ours("qcow2"), examples=30)
TestPlainModel = model_test(plain(4096), examples=20)
TestSmallModel = model_test(by_qemu("qcow2", "refcount_bits=1,cluster_size=512"), examples=10)
TestOldModel = model_test(by_qemu("qcow2", "compat=0.10"), examples=10)
