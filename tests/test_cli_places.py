# SPDX-License-Identifier: Apache-2.0
"""Where `boot` puts a leaf that the user did not place."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstream.cli.places import roomy_directory, warn_if_tight

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def on_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # which is never in memory
        yield Path(directory)


def test_a_temporary_leaf_goes_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, on_disk: Path
) -> None:
    """Not to /tmp, which is often in memory."""
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with roomy_directory() as place:
        assert place.parent == Path("/var/tmp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(on_disk))
    with roomy_directory() as place:
        assert place.parent == on_disk
    assert not place.exists()


def test_a_temporary_leaf_in_memory_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as directory:
        warn_if_tight(Path(directory) / "leaf", 1 << 20)
    (message,) = caplog.messages
    assert "the temporary leaf is in memory" in message
    assert message.endswith("free for a disk of 1.0 MiB): set TMPDIR")


def test_a_disk_that_does_not_fit_is_warned_of(
    caplog: pytest.LogCaptureFixture, on_disk: Path
) -> None:
    warn_if_tight(on_disk / "leaf", 1 << 20)
    assert caplog.messages == []
    warn_if_tight(on_disk / "leaf", 1 << 60)
    (message,) = caplog.messages
    assert "the temporary leaf may not fit" in message
