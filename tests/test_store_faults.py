# SPDX-License-Identifier: Apache-2.0
"""What befalls a store in use: killed processes, new versions, a full or a read-only disk."""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import nbd
import pytest

from testbed.hosts import Host, client, store_host, wait_until
from testbed.link.model import Shape
from testbed.peers import (
    PeerError,
    assert_same,
    binary,
    make_image,
    run,
    temporary_directory,
    unix_uri,
)
from tests.store_support import image

MIB = 1 << 20
SIZE = 16 * MIB
SLOW = Shape(rate=64e6, delay=0.01)
SLOWER = Shape(rate=24e6, delay=0.01)

pytestmark = pytest.mark.timeout(180)


def host(tmp_path: Path, shape: Shape | None = None) -> AbstractContextManager[Host]:
    source = tmp_path / "source"
    make_image(source, SIZE, sparse=False)
    return store_host(source, tmp_path, shape=shape)


@pytest.mark.parametrize("thin", [(), ("--thin",)], ids=["filled", "thin"])
def test_guests_outlive_the_images_process(tmp_path: Path, thin: tuple[str, ...]) -> None:
    """Killed again and again under guests that read all of it: they wait, and get right data."""
    with host(tmp_path, SLOWER) as place, ExitStack() as stack:
        guests = [
            stack.enter_context(place.guest(f"leaf{number}.qcow2", "--stream", "off", *thin))
            for number in range(3)
        ]
        with ThreadPoolExecutor() as pool:
            work = [pool.submit(assert_same, server.uri, place.source) for server in guests]
            killed: set[int] = set()
            for share in (1, 2, 3):
                place.wait_for_bytes(share * SIZE // 8)
                # The guests may have all of it by now if this process was held up.
                wait_until(
                    lambda: all(each.done() for each in work) or place.processes() - killed,
                    "a process",
                )
                for pid in place.processes() - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            for each in work:
                each.result(120)
        assert killed
        for server in guests:
            assert server.terminate() == 0
        for number in range(3):
            run([binary("QEMU_IMG"), "check", "-q", tmp_path / f"leaf{number}.qcow2"])


def test_those_who_start_together_start_one_process(tmp_path: Path) -> None:
    with host(tmp_path) as place, ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            guests = list(
                pool.map(
                    lambda number: stack.enter_context(
                        place.guest(f"leaf{number}.qcow2", "--stream", "off")
                    ),
                    range(6),
                )
            )
        for server in guests:
            with client(server.uri) as handle:
                assert handle.pread(512, 0) == place.source.read_bytes()[:512]
        assert len(place.processes()) == 1
        assert len(place.the_image()["users"]) == 6


def test_a_new_version_is_a_new_image(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        old = image("pull", place.uri, "--store", place.store, "--wait").strip()
        old_content = tmp_path / "old"
        place.source.rename(old_content)
        with place.guest("old.qcow2", "--stream", "off"):
            make_image(place.source, SIZE, seed=1, sparse=False)
            place.restart_far()
            place.forget_answers()
            with place.guest("new.qcow2", "--stream", "off") as server:
                assert_same(server.uri, place.source)
        assert {found["id"] == old for found in place.images()} == {True, False}
        with place.guest("old.qcow2", "--stream", "off") as server:
            assert_same(server.uri, old_content)


@pytest.mark.parametrize("thin", [(), ("--thin",)], ids=["filled", "thin"])
def test_an_old_version_shows_what_is_local_and_never_mixes(
    tmp_path: Path, thin: tuple[str, ...]
) -> None:
    with host(tmp_path) as place:
        with place.guest("old.qcow2", "--stream", "off", *thin) as server:
            with client(server.uri) as handle:
                kept = handle.pread(4096, 4 * MIB)
            place.kill_process()
            make_image(place.source, SIZE, seed=1, sparse=False)
            place.restart_far()
            with client(server.uri) as handle:
                assert handle.pread(4096, 4 * MIB) == kept
        options = ("--stream", "off", "--backing-timeout", "2", *thin)
        with place.guest("old.qcow2", *options) as server:
            with client(server.uri) as handle:
                assert handle.pread(4096, 4 * MIB) == kept
                with pytest.raises(nbd.Error, match="EIO"):
                    handle.pread(4096, 9 * MIB)


def test_a_killed_guests_server_still_counts(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        with place.guest("leaf.qcow2", "--stream", "off") as server:
            server.kill()
        with pytest.raises(PeerError, match="needed by 1 user"):
            image("rm", place.uri, "--store", place.store)
        with place.guest("leaf.qcow2", "--exit-when-complete") as server:
            assert server.wait(60) == 0
        assert "1 image removed" in image("prune", "--keep", "0", "--store", place.store)
        assert place.images() == []


def test_an_image_goes_on_being_pulled_after_its_process_was_killed(tmp_path: Path) -> None:
    with host(tmp_path, SLOW) as place:
        image("pull", place.uri, "--store", place.store)
        place.kill_process()
        assert place.the_image()["pulling"]
        image("pull", place.uri, "--store", place.store, "--wait")
        assert_same(place.the_image()["leaf"], place.source)


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        (tmp_path / "file").touch()
        command = [binary("NBDSTREAM"), "serve", "-b", place.uri, str(tmp_path / "leaf.qcow2")]
        done = subprocess.run(
            [*command, f"--store={tmp_path}/file/store"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "the image store" in done.stderr
        assert "choose another place with --store" in done.stderr
        assert not (tmp_path / "leaf.qcow2").exists()


def test_a_store_whose_path_is_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    store = tmp_path / ("long" * 20)
    with pytest.raises(PeerError, match=r"too long for the sockets in it.*--store"):
        image("ls", "--store", store)
    assert not store.exists()


def test_a_store_that_others_can_write_to_is_refused() -> None:
    with temporary_directory() as open_to_all:
        open_to_all.chmod(0o777)
        with pytest.raises(PeerError, match="other users can write to the image store"):
            image("ls", "--store", open_to_all)


def test_a_leaf_is_served_while_source_and_image_are_gone(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        with place.guest("leaf.qcow2", "--stream", "off") as server, client(server.uri) as handle:
            kept = handle.pread(4096, 4 * MIB)
        place.far.kill()
        place.kill_process()
        shutil.rmtree(place.store)
        with place.guest("leaf.qcow2", "--stream", "off") as server, client(server.uri) as handle:
            assert "going on with what is local" in server.stderr()
            assert handle.pread(4096, 4 * MIB) == kept
            place.restart_far()
            content = place.source.read_bytes()
            assert handle.pread(4096, 9 * MIB) == content[9 * MIB :][:4096]


def test_other_programs_can_read_an_image(tmp_path: Path) -> None:
    with host(tmp_path) as place, place.guest("leaf.qcow2", "--stream", "off"):
        found = place.the_image()
        listed = run(["nbdinfo", "--list", "--json", unix_uri(found["socket"])])
        for name in ("", "/readahead", "/prefetch", "/stream"):
            uri = unix_uri(found["socket"], found["identity"] + name)
            assert f'"{found["identity"]}{name}"' in listed
            assert_same(uri, place.source)


def test_a_store_on_a_read_only_file_system_is_one_line(tmp_path: Path) -> None:
    with host(tmp_path) as place, temporary_directory() as directory:
        run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=700", "tmpfs", directory])
        try:
            run(["mount", "-o", "remount,ro", directory])
            with pytest.raises(PeerError, match=r"the image store .* cannot be used: Read-only"):
                image("pull", place.uri, "--store", directory / "store")
        finally:
            run(["umount", directory])


def test_a_clock_that_jumps_has_the_source_asked_again_and_nothing_else(tmp_path: Path) -> None:
    """What the store remembers of a source may be of a time to come."""
    with host(tmp_path) as place:
        with place.guest("leaf.qcow2", "--stream", "off"):
            pass
        (answer,) = (place.store / "names").glob("*.json")
        values = json.loads(answer.read_text())
        for jump in (1e9, -1e9):
            answer.write_text(json.dumps(values | {"asked": values["asked"] + jump}))
            os.utime(Path(place.the_image()["leaf"]).with_name("used"), (0, time.time() + jump))
            before = len(place.fetched())
            with place.guest(f"leaf{jump}.qcow2", "--stream", "off") as server:
                assert_same(server.uri, place.source)
            assert len(place.fetched()) > before
            assert abs(json.loads(answer.read_text())["asked"] - values["asked"]) < 1000
        assert "0 images removed" in image("prune", "--keep", "0", "--store", place.store)
