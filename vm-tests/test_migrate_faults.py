# SPDX-License-Identifier: Apache-2.0
"""Migrations with faults at random places: no acknowledged write is lost, no guest hangs.

    NBDSTREAM_MIGRATIONS=50 NBDSTREAM_SEED=7 pytest vm-tests/test_migrate_faults.py

A table at the end says what was done. The seed makes the same trials again; what happens in
them still depends on what the machine does meanwhile.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.migrations import faults, moving
from testbed.migrations.arrangement import Ends
from testbed.migrations.faults import Outcome, Trial

COUNT = int(os.environ.get("NBDSTREAM_MIGRATIONS", "6"))
SEED = int(os.environ.get("NBDSTREAM_SEED", "0")) or random.randrange(1, 1 << 31)

pytestmark = pytest.mark.timeout(moving.TRIAL_SECONDS + 60)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[list[Outcome]]:
    """What became of the trials; at the end shown as a table."""
    found: list[Outcome] = []
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print(f"\n\nseed {SEED}\n{faults.HEAD}")
        for outcome in found:
            print(outcome.row())
        lost = sum(max(0, outcome.acknowledged - outcome.found) for outcome in found)
        told = sum(outcome.acknowledged for outcome in found)
        print(f"{len(found)} migrations, {told} acknowledged records, {lost} lost")


@pytest.mark.parametrize("trial", faults.draw(COUNT, SEED), ids=str)
async def test_no_acknowledged_write_is_lost(
    trial: Trial, tmp_path: Path, busybox_image: Path, busybox_disk: Path, outcomes: list[Outcome]
) -> None:
    run = faults.Run(trial, Ends(tmp_path, busybox_image), busybox_disk)
    outcomes.append(run.outcome)
    await run.run()
