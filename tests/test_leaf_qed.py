# SPDX-License-Identifier: Apache-2.0
"""QED leaves: the common suite, and what is their own."""

from typing import Any

import pytest

from tests.leaf_conformance import LeafConformance, model_test
from tests.leaf_support import ImageKind, by_qemu, ours

KINDS = [
    ours("qed"),
    ours("qed", 4096),
    by_qemu("qed", "cluster_size=4096,table_size=2"),
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
