# SPDX-License-Identifier: Apache-2.0
"""Many guests on a store that meets trouble: its process is killed, it has two names,
its file system is full."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testbed.hosts import Host, client, host_of_random_data, image, wait_until
from testbed.peers import PeerError, assert_same, nbdstream_serve, run, temporary_directory

MIB = 1 << 20
SIZE = 16 * MIB
GUESTS = 16
QUIET = ("--stream", "off", "--prefetch", "off")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Host]:
    with host_of_random_data(tmp_path, SIZE) as host:
        yield host


def test_sixteen_guests_wait_while_the_images_process_is_killed(place: Host) -> None:
    """Each waits for something else; one process takes the place of the other, and all of them
    get what they wait for, from the far end once."""
    content = place.source.read_bytes()
    names = [f"leaf{number}.qcow2" for number in range(GUESTS)]
    with ExitStack() as stack, ThreadPoolExecutor(GUESTS) as pool:
        with ThreadPoolExecutor(4) as few:  # all at once, each would take long
            opened = few.map(lambda name: stack.enter_context(place.guest(name, *QUIET)), names)
        handles = [stack.enter_context(client(server.uri)) for server in opened]
        (process,) = place.processes()
        os.kill(process, signal.SIGSTOP)  # so that all of them wait
        reads = [
            pool.submit(handle.pread, 4096, number * MIB + 8192)
            for number, handle in enumerate(handles)
        ]
        wait_until(lambda: all(each.running() for each in reads), "reads")
        os.kill(process, signal.SIGKILL)
        for number, each in enumerate(reads):
            assert each.result(100) == content[number * MIB + 8192 :][:4096]
        assert len(place.processes()) == 1
        assert place.processes() != {process}
        # What one of them has brought all of them have.
        (process,) = place.processes()
        os.kill(process, signal.SIGSTOP)
        for handle in handles:
            assert handle.pread(4096, 3 * MIB + 8192) == content[3 * MIB + 8192 :][:4096]
        os.kill(process, signal.SIGCONT)


def test_one_store_by_two_names_is_one_store(place: Host) -> None:
    """One image, one process, each byte once, and both guests are in the register."""
    other = place.store.with_name("o")
    other.symlink_to(place.store)
    content = place.source.read_bytes()
    leaf = place.leaves / "other.qcow2"
    with (
        place.guest("leaf.qcow2", *QUIET) as one,
        nbdstream_serve(leaf, place.uri, f"--store={other}", *QUIET) as two,
        client(one.uri) as first,
        client(two.uri) as second,
    ):
        assert first.pread(4096, 4 * MIB) == content[4 * MIB :][:4096]
        reads = len(place.fetched())
        assert second.pread(4096, 4 * MIB) == content[4 * MIB :][:4096]
        assert len(place.fetched()) == reads
        assert len(place.processes()) == 1
        assert len(place.the_image()["users"]) == 2


@contextmanager
def small_file_system(size: int) -> Iterator[Path]:
    """A file system of so many bytes. Needs root."""
    with temporary_directory() as directory:
        run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", directory])
        try:
            yield directory
        finally:
            run(["umount", "--lazy", directory])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_store_on_a_full_file_system_serves_its_guests_and_goes_on_with_more_space(
    place: Host,
) -> None:
    """Also those that are started again, and by a process that is started again. A new guest
    cannot be entered as a user, and is told so in one line."""
    with small_file_system(6 * MIB) as directory:
        place.store = directory / "store"
        (place.store / "images").mkdir(mode=0o700, parents=True)
        place.store.chmod(0o700)
        try:
            with place.guest("thin.qcow2", "--thin", *QUIET) as server:
                assert_same(server.uri, place.source)
                assert place.the_image()["local"] < SIZE
                assert os.statvfs(directory).f_bavail == 0
                place.kill_process()
                assert_same(server.uri, place.source)
            with place.guest("thin.qcow2", "--thin", *QUIET) as server:
                assert_same(server.uri, place.source)
                with pytest.raises(
                    PeerError, match=r"store .*: No space left on device; make room"
                ):
                    with place.guest("new.qcow2"):
                        pass
            assert len(place.the_image()["users"]) == 1
            run(["mount", "-o", f"remount,size={64 * MIB}", directory])
            image("pull", place.uri, "--store", place.store, "--wait")
            assert_same(place.the_image()["leaf"], place.source)
        finally:
            place.kill_process()
