# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests with real guests: images (built once, then cached) and copies."""

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.guests import images, systems


@pytest.fixture(scope="session")
def busybox_image() -> Path:
    """The directory of the small guest's image; read-only."""
    return images.busybox()


@pytest.fixture(scope="session")
def debian_image() -> Path:
    """The directory of the Debian guest's image; read-only."""
    return images.debian()


@pytest.fixture(params=["busybox", "debian"])
def system(request: pytest.FixtureRequest) -> systems.System:
    """Each of the two systems in turn; ``system_disk`` is its disk."""
    return {"busybox": systems.BUSYBOX, "debian": systems.DEBIAN}[request.param]


@pytest.fixture
def system_disk(system: systems.System, tmp_path: Path) -> Path:
    """A copy of the system's disk, to be written to."""
    image = images.busybox() if system is systems.BUSYBOX else images.debian()
    return images.copy_image(image / "disk.raw", tmp_path / "disk.raw")


@pytest.fixture
def busybox_disk(busybox_image: Path, tmp_path: Path) -> Path:
    """A copy of the small guest's disk, to be written to."""
    return images.copy_image(busybox_image / "disk.raw", tmp_path / "disk.raw")


@pytest.fixture
def console_log() -> Callable[[str], None]:
    """Pass as ``on_console``: pytest shows what the guest printed if the test fails."""
    return lambda text: print(text, end="")
