# SPDX-License-Identifier: Apache-2.0
"""The collection of boot profiles: found by what they are of, bounded, and only advice."""

import fcntl
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from nbdstream.streamer import profile_store
from nbdstream.streamer.profile import Profile, Range, write_profile
from nbdstream.streamer.profile_store import ProfileStore, common_bytes, default_directory, merged

KIB = 1024
MIB = 1024 * KIB
SIZE = 64 * MIB
UNIT = 64 * KIB
IDENTITY = "s1:" + "ab" * 32


def profile(*units: int, complete: bool = True, identity: str = IDENTITY) -> Profile:
    ranges = tuple(Range(unit * UNIT, UNIT) for unit in units)
    return Profile(SIZE, identity, UNIT, 1.0, complete, ranges)


def of_image(number: int) -> Profile:
    return profile(1, identity=f"s1:{number:064x}")


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "state" / "profiles")


def only_path(store: ProfileStore) -> Path:
    (entry,) = store.entries()
    return entry.path


def test_a_profile_is_found_by_what_it_is_of(store: ProfileStore) -> None:
    assert store.find(IDENTITY, SIZE) is None and store.entries() == []
    assert store.keep(profile(1, 2))
    assert store.find(IDENTITY, SIZE) == profile(1, 2)
    assert store.find(IDENTITY, SIZE + 1) is None
    assert store.find("s1:" + "cd" * 32, SIZE) is None


@pytest.mark.parametrize("identity", ["", "standby", "../../etc/x", "s1:" + "AB" * 32, "s1:ab"])
def test_what_is_no_fingerprint_names_no_file(store: ProfileStore, identity: str) -> None:
    assert not store.keep(profile(1, identity=identity))
    assert store.find(identity, SIZE) is None
    assert not store.directory.exists()


@pytest.mark.parametrize("damage", [b"", b"nonsense\n", b"nbdstream boot profile 1\nunit 3\n\n"])
def test_a_damaged_file_is_ignored_with_one_line_and_replaced(
    store: ProfileStore, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.keep(profile(1))
    path = only_path(store)
    path.write_bytes(damage)
    assert store.find(IDENTITY, SIZE) is None
    assert len(caplog.records) == 1 and str(path) in caplog.messages[0]
    caplog.clear()
    assert store.keep(profile(2)) and len(caplog.records) == 1
    assert store.find(IDENTITY, SIZE) == profile(2)


def test_a_profile_under_the_name_of_another_image_is_ignored(
    store: ProfileStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.keep(profile(1))
    write_profile(str(only_path(store)), of_image(3))
    assert store.find(IDENTITY, SIZE) is None
    assert "another image" in caplog.text


def test_what_was_not_used_for_longest_goes_first(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_store, "COUNT_MOST", 3)
    for number in range(3):
        store.keep(of_image(number))
        for entry in store.entries():
            os.utime(entry.path, (entry.used - 10, entry.used - 10))
    assert store.find(of_image(0).backing_identity, SIZE) == of_image(0)
    store.keep(of_image(3))
    assert store.find(of_image(1).backing_identity, SIZE) is None
    assert {entry.path.name[:10] for entry in store.entries()} == {"s1-0000000"}
    assert len(store.entries()) == 3


def test_the_bytes_are_bounded_too(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.keep(of_image(1))
    monkeypatch.setattr(profile_store, "BYTES_MOST", 2 * store.entries()[0].bytes)
    for number in range(2, 6):
        store.keep(of_image(number))
    assert len(store.entries()) == 2
    # What was kept just now stays, however large it is.
    monkeypatch.setattr(profile_store, "BYTES_MOST", 1)
    store.keep(of_image(9))
    assert store.find(of_image(9).backing_identity, SIZE) == of_image(9)


def test_files_of_other_names_are_left_alone(store: ProfileStore) -> None:
    store.keep(profile(1))
    other = store.directory / "notes.txt"
    other.write_text("mine")
    link = only_path(store).with_name("s1-" + "0" * 64 + "-1.profile")
    link.symlink_to(other)
    assert [entry.path for entry in store.entries()] == [only_path(store)]
    assert other.read_text() == "mine"


def test_what_a_killed_server_left_is_removed(store: ProfileStore) -> None:
    store.keep(profile(1))
    left, fresh = (store.directory / f".{only_path(store).name}.{end}" for end in ("a", "b"))
    left.touch()
    fresh.touch()
    os.utime(left, (0, 0))
    store.keep(of_image(1))
    assert not left.exists() and fresh.exists()


def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = ProfileStore(tmp_path / "file" / "profiles")
    assert not store.keep(profile(1))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (profile(1, 2), profile(2, 3), profile(1, 2)),
        (profile(1, 2, 3), profile(3, 7, 8, 9), profile(3, 7, 8, 9)),
        (profile(1, 2, 3), profile(7, 8, 9, complete=False), profile(1, 2, 3)),
        (profile(1, 2, complete=False), profile(5), profile(5)),
        (profile(1, complete=False), profile(1, 2, complete=False), profile(1, 2, complete=False)),
    ],
    ids=["still useful", "stale", "cut short later", "now complete", "both cut short"],
)
def test_what_becomes_of_two(old: Profile, new: Profile, wanted: Profile) -> None:
    found = merged(old, new)
    assert sum(common_bytes(found, replace(wanted, ranges=(one,))) for one in wanted.ranges) == (
        wanted.bytes
    )
    assert (found.bytes, found.complete) == (wanted.bytes, wanted.complete)


def test_servers_that_end_at_the_same_time_lose_nothing(store: ProfileStore) -> None:
    parts = [profile(*range(start, start + 4), complete=False) for start in range(0, 40, 4)]
    start = threading.Barrier(len(parts))

    def end(part: Profile) -> None:
        start.wait()
        ProfileStore(store.directory).keep(part)

    threads = [threading.Thread(target=end, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.find(IDENTITY, SIZE)
    assert found is not None and found.bytes == 40 * UNIT


def test_a_server_that_is_stopped_with_the_lock_stops_no_other(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_store, "LOCK_SECONDS", 0.05)
    store.directory.mkdir(parents=True)
    fd = os.open(store.directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert store.keep(profile(1))
    finally:
        os.close(fd)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "nbdstream/profiles"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory() == Path("/var/lib/nbdstream/profiles")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/ann")
    assert default_directory() == Path("/home/ann/.local/state/nbdstream/profiles")


def test_a_store_of_another_user_is_read_and_not_written(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.keep(profile(1))
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert store.find(IDENTITY, SIZE) == profile(1)
    assert not store.keep(of_image(2))
