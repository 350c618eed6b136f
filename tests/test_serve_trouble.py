# SPDX-License-Identifier: Apache-2.0
"""``nbdstream serve`` in trouble: a backing that is lost or another one, a full disk, signals."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbd
import pytest

from testbed.peers import (
    PeerError,
    Qmp,
    assert_same,
    make_image,
    nbdkit,
    nbdstream_serve,
    run,
    temporary_directory,
)
from tests.serve_support import (
    FORMATS,
    MIB,
    SIZE,
    check_clean,
    client,
    format_of,
    image_file,
    leaf_path,
    nbdstream,
    wait_for,
)

pytestmark = pytest.mark.timeout(120)

image = pytest.fixture(image_file, scope="session")
leaf = pytest.fixture(leaf_path, params=FORMATS)


def test_a_lost_backing_holds_up_only_those_who_need_it(leaf: Path, image: Path) -> None:
    expected = image.read_bytes()
    with temporary_directory() as directory:
        socket = directory / "backing"
        with nbdkit("file", image, readonly=True, socket_path=socket) as backing:
            with nbdstream_serve(leaf, backing.uri, "--stream", "off") as server:
                with client(server.uri) as guest, client(server.uri) as other:
                    assert guest.pread(MIB, 0) == expected[:MIB]
                    backing.kill()
                    answers: list[bytes] = []
                    waiting = threading.Thread(
                        target=lambda: answers.append(other.pread(9000, 10 * MIB))
                    )
                    waiting.start()
                    for _ in range(20):
                        assert guest.pread(MIB, 0) == expected[:MIB]
                    # Whole blocks of the leaf need nothing (4 KiB, but for QED's clusters).
                    guest.pwrite(b"w" * MIB, 4 * MIB)
                    guest.zero(MIB, 6 * MIB)
                    guest.flush()
                    assert guest.pread(MIB, 4 * MIB) == b"w" * MIB
                    assert not answers
                    with nbdkit("file", image, readonly=True, socket_path=socket):
                        waiting.join(30)
                        assert answers == [expected[10 * MIB : 10 * MIB + 9000]]
                    assert server.process.poll() is None


def test_a_backing_timeout_turns_waiting_into_an_error(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(
            leaf, backing.uri, "--stream", "off", "--backing-timeout", "1"
        ) as server:
            backing.kill()
            with client(server.uri) as guest:
                with pytest.raises(nbd.Error, match="Input/output error"):
                    guest.pread(4096, 10 * MIB)
                guest.pwrite(b"w" * 4096, 10 * MIB)
                assert guest.pread(4096, 10 * MIB) == b"w" * 4096
        assert re.search("[0-9]+ .*local", nbdstream("map", leaf).stdout)


def test_errors_of_the_backing_are_never_data(leaf: Path, image: Path, tmp_path: Path) -> None:
    switch = tmp_path / "fail"
    switch.touch()
    with nbdkit(
        "file",
        image,
        "error-pread-rate=100%",
        f"error-file={switch}",
        filters=["error"],
        readonly=True,
    ) as backing:
        switch.unlink()
        assert nbdstream("create", leaf, "-b", backing.uri).returncode == 0
        with nbdstream_serve(leaf, None, "--exit-when-complete", "--stream", "paused") as server:
            switch.touch()
            with Qmp(server.control) as qmp:  # type: ignore[arg-type]
                with suppress(
                    PeerError
                ):  # one that paused before the disk was full goes on by itself
                    qmp.execute("block-job-resume", device="disk0")
                wait_for(
                    lambda: qmp.execute("x-nbdstream-stats")["backing"]["retries"] >= 3, "errors"
                )
                assert qmp.execute("query-block-jobs")[0]["status"] == "running"
            switch.unlink()
            assert server.wait(60) == 0
    assert_same(leaf, image, format_of(leaf))


def test_another_image_behind_the_same_uri_is_refused(tmp_path: Path, image: Path) -> None:
    leaf, other, larger = tmp_path / "leaf.qcow2", tmp_path / "other", tmp_path / "larger"
    make_image(other, SIZE, seed=1)
    make_image(larger, 2 * SIZE)
    with temporary_directory() as directory:
        socket = directory / "backing"
        with nbdkit("file", image, readonly=True, socket_path=socket) as backing:
            assert nbdstream("create", leaf, "-b", backing.uri).returncode == 0
        before = leaf.read_bytes()
        for wrong in (other, larger):
            with nbdkit("file", wrong, readonly=True, socket_path=socket):
                result = nbdstream("serve", leaf, "-U", "-")
                assert result.returncode == 1
                assert result.stderr.count("\n") == 1
                assert re.match(r"nbdstream: error: .*belongs to", result.stderr)
        assert leaf.read_bytes() == before


def test_sigterm_finishes_what_is_in_flight_and_closes_the_leaf_clean(
    leaf: Path, image: Path
) -> None:
    with nbdkit(
        "file", image, "rdelay=300ms", filters=["delay"], threads=16, readonly=True
    ) as backing:
        with nbdstream_serve(leaf, backing.uri, "--stream", "off") as server:
            with client(server.uri) as guest:
                buffer = nbd.Buffer(9000)
                cookie = guest.aio_pread(buffer, 3 * MIB)
                guest.pwrite(b"last words" * 100, 0)
                server.process.send_signal(signal.SIGTERM)
                while not guest.aio_command_completed(cookie):
                    guest.poll(-1)
                assert buffer.to_bytearray() == image.read_bytes()[3 * MIB : 3 * MIB + 9000]
                assert server.wait(30) == 0
            check_clean(leaf)
            with nbdstream_serve(leaf, None, "--stream", "off") as again:
                with client(again.uri) as guest:
                    assert guest.pread(1000, 0) == b"last words" * 100


def test_a_second_signal_ends_at_once(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--stream", "off") as server:
            backing.kill()
            with client(server.uri) as guest:
                guest.aio_pread(nbd.Buffer(9000), 3 * MIB)  # cannot be finished
                guest.pwrite(b"x" * 4096, 0)
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(0.5)
                server.process.send_signal(signal.SIGTERM)
                assert server.wait(5) == 128 + signal.SIGTERM


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    directory = tmp_path / "small"
    directory.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", directory])
    yield directory
    run(["umount", directory])


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_full_disk_pauses_the_job_and_guests_can_still_read(
    small_disk: Path, image_format: str, image: Path
) -> None:
    leaf = small_disk / f"leaf.{image_format}"
    expected = image.read_bytes()
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--exit-when-complete") as server:
            assert server.control is not None
            with Qmp(server.control) as qmp, client(server.uri) as guest:
                wait_for(
                    lambda: qmp.execute("query-block-jobs")[0]["io-status"] == "nospace",
                    "pause for want of space",
                )
                assert guest.pread(MIB, 20 * MIB) == expected[20 * MIB : 21 * MIB]
                with pytest.raises(nbd.Error, match="space"):
                    guest.pwrite(b"x" * 4 * MIB, 18 * MIB)
                run(["mount", "-o", "remount,size=64M", small_disk])
                guest.pwrite(expected[18 * MIB : 22 * MIB], 18 * MIB)
                guest.flush()
                # A job that paused just before the disk was full goes on by itself.
                with suppress(PeerError):
                    qmp.execute("block-job-resume", device="disk0")
            assert server.wait(60) == 0
    assert_same(leaf, image, image_format)
