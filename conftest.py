# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of the checkout: no skips, guests' images for those that ask, and
property tests that draw the same examples in each run."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["testbed.strict", "testbed.guests.fixtures"]

# A shell that starts the tests in the background has them ignore SIGINT, and what they start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A change is judged by itself, not by the luck of the draw. NBDSTREAM_FRESH=1 draws others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("fresh")
settings.load_profile("fresh" if os.environ.get("NBDSTREAM_FRESH") else "fixed")


@pytest.fixture(autouse=True)
def _no_boot_profiles_of_others(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Each test has a collection of boot profiles of its own: what another one has recorded
    would be fetched first."""
    state = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    return state
