# SPDX-License-Identifier: Apache-2.0
"""Boot profiles, prefetching, readahead and deadlines on real servers, as users meet them."""

import json
import os
import random
import subprocess
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from nbdstream.streamer.profile import Profile, Range, format_profile, read_profile, write_profile
from testbed.peers import Peer, Qmp, binary, make_image, nbdkit, nbdstream_serve, run

KIB = 1024
MIB = 1024 * KIB
SIZE = 48 * MIB
CLUSTER = 64 * KIB
ORDER = random.Random(8).sample(range(SIZE // CLUSTER), 60)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "image.raw"
    make_image(path, SIZE, sparse=False)
    return path


@contextmanager
def connected(peer: Peer) -> Iterator[nbd.NBD]:
    handle = nbd.NBD()
    handle.connect_uri(peer.uri)
    try:
        yield handle
    finally:
        handle.shutdown()


def boot(peer: Peer, image: Path) -> None:
    """Read as a guest does that boots, and see that it gets the image's bytes."""
    with connected(peer) as guest, image.open("rb") as original:
        for unit in ORDER:
            data = guest.pread(4 * KIB, unit * CLUSTER + 8 * KIB)
            assert data == os.pread(original.fileno(), 4 * KIB, unit * CLUSTER + 8 * KIB)


def statistics(peer: Peer) -> dict[str, dict[str, int]]:
    assert peer.control is not None
    with Qmp(peer.control) as qmp:
        found: dict[str, dict[str, int]] = qmp.execute("x-nbdstream-stats")
        return found


def cluster_size(peer: Peer) -> int:
    assert peer.control is not None
    with Qmp(peer.control) as qmp:
        return int(qmp.execute("query-block")[0]["inserted"]["image"]["cluster-size"])


def rounded(profile: Profile, cluster: int) -> int:
    """How much a profile names in whole clusters."""
    clusters = {
        number
        for offset, length in profile.ranges
        for number in range(offset // cluster, -(-(offset + length) // cluster))
    }
    return len(clusters) * cluster


def nbdstream(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [binary("NBDSTREAM"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def refused(*arguments: str | Path) -> str:
    """The one line that a command fails with, and that it fails."""
    done = nbdstream(*arguments)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert done.stderr.startswith("nbdstream: error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_a_boot_is_recorded_and_serves_another_leaf(image: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.raw", tmp_path / "second.qcow2"
    with nbdkit("file", image) as far:
        with nbdstream_serve(first, far.uri, "--stream", "off") as peer:
            boot(peer, image)
            assert peer.terminate() == 0
        recorded = read_profile(f"{first}.profile")
        assert recorded.backing_size == SIZE and recorded.backing_identity.startswith("s1:")
        touched = [
            unit
            for offset, length in recorded.ranges
            for unit in range(offset // CLUSTER, (offset + length) // CLUSTER)
        ]
        assert [unit for unit in touched if unit in ORDER] == ORDER
        exported = tmp_path / "image.profile"
        assert nbdstream("profile", "export", first, "-o", exported).returncode == 0
        prefetch = ("--stream", "off", "--prefetch", str(exported))
        with nbdstream_serve(second, far.uri, *prefetch) as peer:
            wanted = rounded(recorded, cluster_size(peer))
            peer.wait_until(
                lambda: statistics(peer)["disk"]["fetched-bytes"] >= wanted, "profile fetched", 20
            )
            boot(peer, image)
            stats = statistics(peer)
            assert stats["disk"]["demand-misses"] == 0
            assert peer.terminate() == 0
            assert peer.stderr() == ""


def test_a_foreign_profile_is_used_with_a_warning(image: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.profile"
    ranges = (Range(5 * MIB, CLUSTER), Range(SIZE, MIB), Range(3 * SIZE, MIB))
    write_profile(str(foreign), Profile(4 * SIZE, "s1:else", CLUSTER, 1.0, True, ranges))
    with nbdkit("file", image) as far:
        arguments = ("--stream", "off", "--prefetch", str(foreign))
        with nbdstream_serve(tmp_path / "leaf.raw", far.uri, *arguments) as peer:
            peer.wait_until(
                lambda: statistics(peer)["disk"]["fetched-bytes"] >= CLUSTER, "prefetch", 20
            )
            peer.terminate()
            assert peer.stderr().count("\n") == 1 and "another backing" in peer.stderr()
    found = json.loads(run(["nbdstream", "info", "--json", tmp_path / "leaf.raw"]))
    assert found["nbdstream"]["local"] == CLUSTER


def test_readahead_spares_a_sequential_guest_its_round_trips(image: Path, tmp_path: Path) -> None:
    with nbdkit("file", image, "rdelay=20ms", filters=["delay"], threads=32) as far:
        with nbdstream_serve(tmp_path / "leaf.raw", far.uri, "--stream", "off") as peer:
            with connected(peer) as guest:
                for offset in range(0, 16 * MIB, CLUSTER):
                    guest.pread(CLUSTER, offset)
            stats = statistics(peer)
    assert stats["disk"]["readahead-bytes"] > 12 * MIB
    # Most requests found their data there already, or on its way.
    assert stats["disk"]["demand-misses"] < 16 * MIB // CLUSTER // 2


def test_a_deadline_that_the_link_cannot_meet_is_told_within_seconds(
    image: Path, tmp_path: Path
) -> None:
    with nbdkit("file", image, "rate=8M", filters=["rate"]) as far:  # 1 MB/s: 48 seconds
        arguments = ("--finish-in", "15s")
        with nbdstream_serve(tmp_path / "leaf.raw", far.uri, *arguments) as peer:
            peer.wait_until(lambda: "cannot finish" in peer.stderr(), "warning", 30)
            told = statistics(peer)["job"]["finish-in"]
            assert isinstance(told, dict) and told["on-time"] is False

            def lateness_is_right() -> bool:  # the rate filter gives bursts at first
                return 20 < statistics(peer)["job"]["finish-in"].get("late", 0) < 50

            peer.wait_until(lateness_is_right, "an honest estimate", 20)
            shown = nbdstream("status", str(peer.control)).stdout
            assert "will miss its deadline" in shown and "finish:" in shown


def test_a_deadline_makes_the_job_slow_but_not_too_slow(image: Path, tmp_path: Path) -> None:
    with nbdkit("file", image, "rdelay=5ms", "rate=64M", filters=["delay", "rate"]) as far:
        arguments = ("--finish-in", "10s", "--exit-when-complete")
        with nbdstream_serve(tmp_path / "leaf.raw", far.uri, *arguments) as peer:
            start = time.monotonic()
            assert peer.wait(50) == 0
        # Unpaced it takes the 3 seconds in which the link is measured, and little more.
        assert time.monotonic() - start > 4


# -- the command line ------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "boot.profile"
    ranges = tuple(Range(unit * CLUSTER, CLUSTER) for unit in ORDER)
    write_profile(str(path), Profile(SIZE, "s1:abc", CLUSTER, 61.5, True, ranges))
    return path


def test_show(profile: Path, tmp_path: Path) -> None:
    shown = nbdstream("profile", "show", profile).stdout
    assert "48.0 MiB" in shown and "s1:abc" in shown and "1m02s" in shown
    assert f"… and {len(ORDER) - 10} more" in shown
    everything = nbdstream("profile", "show", "--all", profile).stdout
    assert all(f" {unit * CLUSTER} " in everything for unit in ORDER)
    facts = json.loads(nbdstream("profile", "show", "--json", profile).stdout)
    assert [one["offset"] // CLUSTER for one in facts["ranges"]] == ORDER
    assert facts["bytes"] == len(ORDER) * CLUSTER and facts["complete"] is True
    picture = tmp_path / "boot.svg"
    assert nbdstream("profile", "show", "--svg", picture, profile).returncode == 0
    paths = xml.etree.ElementTree.parse(picture).findall("{http://www.w3.org/2000/svg}path")
    assert paths[0].attrib["d"].count("M") == len(ORDER)


def test_combine_and_export(profile: Path, tmp_path: Path) -> None:
    text = profile.read_text()
    assert nbdstream("profile", "combine", profile, profile).stdout == text
    leaf = tmp_path / "leaf.qcow2"
    profile.rename(f"{leaf}.profile")
    assert nbdstream("profile", "export", leaf).stdout == text
    out = tmp_path / "out"
    assert nbdstream("profile", "combine", f"{leaf}.profile", "-o", out).stdout == ""
    assert out.read_text() == text


def test_an_empty_profile_is_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "empty.profile"
    path.write_text(format_profile(Profile(0, "", 512, 0.0, False, ())))
    assert "0 ranges" in nbdstream("profile", "show", path).stdout
    assert "cut short" in nbdstream("profile", "show", path).stdout
    assert "<svg" in nbdstream("profile", "show", "--svg", "-", path).stdout


def test_what_makes_no_sense_is_refused_in_one_line(profile: Path, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    assert "no profile: boot a guest" in refused("profile", "export", leaf)
    assert "No such file" in refused("profile", "show", tmp_path / "none")
    damaged = tmp_path / "damaged"
    damaged.write_text(profile.read_text()[:-3])
    assert "cut short" in refused("profile", "show", damaged)
    other = tmp_path / "other.profile"
    other.write_text(profile.read_text().replace("s1:abc", "s1:def"))
    assert "different backings" in refused("profile", "combine", profile, other)
    serve = ("serve", leaf, "-b", "nbd+unix:///?socket=/nowhere", "-U", tmp_path / "s")
    assert "cut short" in refused(*serve, "--prefetch", damaged)
    assert "--read-only" in refused(*serve, "--prefetch", profile, "--read-only")
    assert "--stream off" in refused(*serve, "--finish-in", "1h", "--stream", "off")
    assert not leaf.exists()


def test_the_old_name_of_finish_in_still_works_and_says_so(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    arguments = ("-b", "nbd+unix:///?socket=/nowhere", "-U", tmp_path / "s", "--stream", "off")
    done = nbdstream("serve", leaf, *arguments, "--finish-by", "1h")
    warning, error = done.stderr.splitlines()
    assert warning == "nbdstream: warning: --finish-by is deprecated: use --finish-in"
    assert error.startswith("nbdstream: error: --finish-in needs a stream job")
    assert done.returncode == 2
