# SPDX-License-Identifier: Apache-2.0
"""A process killed at a step of a migration: a sample of what `testbed.migrations.walk` has.

    NBDSTREAM_KILLS=20 NBDSTREAM_SEED=7 pytest vm-tests/test_migrate_walk.py

All of them: ``./dev soak migrations``.
"""

import os
import random
from pathlib import Path

import pytest

from testbed.migrations import moving, walk

COUNT = int(os.environ.get("NBDSTREAM_KILLS", "5"))
SEED = int(os.environ.get("NBDSTREAM_SEED", "0")) or random.randrange(1, 1 << 31)

pytestmark = pytest.mark.timeout(moving.TRIAL_SECONDS + 60)


@pytest.mark.parametrize("cell", walk.sample(COUNT, SEED), ids=str)
def test_a_kill_costs_no_acknowledged_write(cell: walk.Cell, busybox_image: Path) -> None:
    found = walk.walk(cell, busybox_image)
    assert not found.broken, f"{found.broken}\n{found.said}"
