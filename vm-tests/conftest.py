# SPDX-License-Identifier: Apache-2.0
"""What tests of migrations start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.migrations.arrangement import Ends
from testbed.peers import Peer, nbdkit


@pytest.fixture
def ends(tmp_path: Path, busybox_image: Path) -> Ends:
    return Ends(tmp_path, busybox_image)


@pytest.fixture
def remote(busybox_disk: Path) -> Iterator[Peer]:
    """The image from which the source's guest boots, far away."""
    with nbdkit("file", busybox_disk, readonly=True) as server:
        yield server
