# SPDX-License-Identifier: Apache-2.0
"""Boot profiles by themselves: the second boot of an image is fast with no option."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from nbdstream.errors import UsageError
from nbdstream.streamer.profile import Profile, read_profile, write_profile
from nbdstream.streamer.profile_published import published_uri
from nbdstream.streamer.profile_store import ProfileStore, default_directory
from testbed.peers import Peer, Qmp, binary, make_image, nbdkit, nbdstream_serve, run
from testbed.remotes import s3_server

KIB = 1024
MIB = 1024 * KIB
SIZE = 48 * MIB
CLUSTER = 64 * KIB
ORDER = random.Random(9).sample(range(SIZE // CLUSTER), 60)
NO_STREAM = ("--stream", "off")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exports")
    make_image(directory / "image.raw", SIZE, sparse=False)
    return directory / "image.raw"


@pytest.fixture
def stored() -> ProfileStore:
    """The collection that the servers of this test use."""
    return ProfileStore(default_directory())


def boot(peer: Peer) -> None:
    guest = nbd.NBD()
    guest.connect_uri(peer.uri)
    for unit in ORDER:
        guest.pread(4 * KIB, unit * CLUSTER)
    guest.shutdown()


def disk_statistics(peer: Peer) -> dict[str, int]:
    assert peer.control is not None
    with Qmp(peer.control) as qmp:
        found: dict[str, int] = qmp.execute("x-nbdstream-stats")["disk"]
        return found


def misses_of_a_boot(peer: Peer, known: Profile | None) -> int:
    """How many reads of a boot wait for the backing, once a known profile was fetched."""
    if known is not None:
        peer.wait_until(
            lambda: disk_statistics(peer)["fetched-bytes"] >= known.bytes, "profile fetched", 20
        )
    boot(peer)
    return disk_statistics(peer)["demand-misses"]


def record(leaf: Path, uri: str, *options: str) -> None:
    """Boot once from a new leaf, and stop the server cleanly."""
    with nbdstream_serve(leaf, uri, *NO_STREAM, *options) as peer:
        boot(peer)
        assert peer.terminate() == 0
        assert peer.stderr() == ""


def test_the_second_boot_of_an_image_needs_no_option(
    image: Path, tmp_path: Path, stored: ProfileStore
) -> None:
    with nbdkit("file", image) as far, nbdkit("file", image) as same_image_elsewhere:
        record(tmp_path / "first.raw", far.uri)
        (entry,) = stored.entries()
        known = read_profile(str(entry.path))
        with nbdstream_serve(tmp_path / "2.raw", same_image_elsewhere.uri, *NO_STREAM) as peer:
            assert misses_of_a_boot(peer, known) == 0
            assert peer.terminate() == 0
            assert peer.stderr() == ""
    listed = json.loads(run([binary("NBDSTREAM"), "profile", "list", "--json"]))
    assert [(one["path"], one["backing-size"]) for one in listed] == [(str(entry.path), SIZE)]
    assert str(entry.path) in run([binary("NBDSTREAM"), "profile", "list"])


def test_off_neither_fetches_nor_keeps(image: Path, tmp_path: Path, stored: ProfileStore) -> None:
    with nbdkit("file", image) as far:
        record(tmp_path / "first.raw", far.uri, "--prefetch", "off")
        assert stored.entries() == []
        record(tmp_path / "second.raw", far.uri)
        assert len(stored.entries()) == 1
        options = (*NO_STREAM, "--prefetch", "off")
        with nbdstream_serve(tmp_path / "third.raw", far.uri, *options) as peer:
            assert misses_of_a_boot(peer, None) > len(ORDER) / 2


def test_a_leaf_of_another_image_is_left_alone(
    image: Path, tmp_path: Path, stored: ProfileStore
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(os.urandom(64 * KIB) + image.read_bytes()[64 * KIB :])
    with nbdkit("file", image) as far:
        record(tmp_path / "first.raw", far.uri)
    with nbdkit("file", other) as far:
        record(tmp_path / "second.raw", far.uri)
    assert len(stored.entries()) == 2


def test_a_damaged_profile_is_one_line(image: Path, tmp_path: Path, stored: ProfileStore) -> None:
    with nbdkit("file", image) as far:
        record(tmp_path / "first.raw", far.uri)
        (entry,) = stored.entries()
        entry.path.write_text("nonsense")
        with nbdstream_serve(tmp_path / "second.raw", far.uri, *NO_STREAM) as peer:
            peer.wait_until(lambda: "ignored" in peer.stderr(), "warning", 20)
            assert misses_of_a_boot(peer, None) > 0
            assert peer.stderr().count("\n") == 1


@pytest.fixture
def published(image: Path, tmp_path: Path, stored: ProfileStore) -> Profile:
    """A profile of the image, which the user's collection does not have."""
    with nbdkit("file", image) as far:
        record(tmp_path / "recorded.raw", far.uri)
    (entry,) = stored.entries()
    found = read_profile(str(entry.path))
    entry.path.unlink()
    return found


def test_a_profile_beside_an_export_is_found_and_kept(
    image: Path, published: Profile, tmp_path: Path, stored: ProfileStore
) -> None:
    write_profile(f"{image}.nbdprofile", published)
    try:
        with nbdkit("file", f"dir={image.parent}") as far:
            uri = far.uri.replace("///?", "///image.raw?")
            with nbdstream_serve(tmp_path / "leaf.raw", uri, *NO_STREAM) as peer:
                assert misses_of_a_boot(peer, published) == 0
        assert stored.find(published.backing_identity, SIZE) == published
    finally:
        Path(f"{image}.nbdprofile").unlink()


def test_a_profile_beside_an_object_is_found(
    image: Path, published: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(str(tmp_path / "published"), published)
    with s3_server() as objects:
        for name, value in objects.environment.items():
            monkeypatch.setenv(name, value)
        objects.put("images")
        objects.put("images", "debian.raw", image.read_bytes())
        objects.put("images", "debian.raw.nbdprofile", (tmp_path / "published").read_bytes())
        uri = "s3://images/debian.raw"
        with nbdstream_serve(tmp_path / "leaf.raw", uri, *NO_STREAM) as peer:
            assert misses_of_a_boot(peer, published) == 0


def _of_another_image(text: str) -> str:
    return text.replace("backing-identity s1:", "backing-identity s1:0")


def _damaged(text: str) -> str:
    return text.replace("unit", "uint")


def _too_large(text: str) -> str:
    return text + "0 65536\n" * 200_000


@pytest.mark.parametrize(
    ("change", "warnings"), [(_of_another_image, 1), (_damaged, 1), (_too_large, 0)]
)
def test_what_is_published_is_not_trusted(
    image: Path,
    published: Profile,
    tmp_path: Path,
    change: Callable[[str], str],
    warnings: int,
    stored: ProfileStore,
) -> None:
    beside = Path(f"{image}.nbdprofile")
    write_profile(str(beside), published)
    beside.write_text(change(beside.read_text()))
    try:
        with nbdkit("file", f"dir={image.parent}") as far:
            uri = far.uri.replace("///?", "///image.raw?")
            with nbdstream_serve(tmp_path / "leaf.raw", uri, *NO_STREAM) as peer:
                if warnings:
                    peer.wait_until(lambda: "ignored" in peer.stderr(), "warning", 20)
                assert misses_of_a_boot(peer, None) > len(ORDER) / 2
                assert peer.stderr().count("\n") == warnings
    finally:
        beside.unlink()


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("nbd://host/debian", "nbd://host:10809/debian.nbdprofile"),
        ("nbd+unix:///?socket=/run/x", "nbd+unix:///.nbdprofile?socket=/run/x"),
        ("https://host/a/b.raw?v=1", "https://host/a/b.raw.nbdprofile?v=1"),
        ("qcow2+https://host/b.qcow2", "https://host/b.qcow2.nbdprofile"),
        ("s3://bucket/key", "s3://bucket/key.nbdprofile"),
        ("ssh://host/image", None),
        ("/images/debian.raw", None),
    ],
)
def test_where_a_profile_is_published(uri: str, wanted: str | None) -> None:
    assert published_uri(uri) == wanted


def test_what_is_no_uri_has_no_profile() -> None:
    with pytest.raises(UsageError):
        published_uri("nbd://host:port/x")
