# SPDX-License-Identifier: Apache-2.0
"""``nbdstream serve`` as its users meet it: real backings, real clients, real trouble."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

import nbd
import pytest

from testbed.peers import (
    Qmp,
    assert_same,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    qemu_nbd,
    run,
    temporary_directory,
)
from testbed.processes import children

MIB = 1 << 20
SIZE = 24 * MIB + 4096 + 512  # no multiple of any cluster size, nor of a block
FORMATS = ["raw", "qcow2", "qed"]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backing's content, with holes, zeroes and data."""
    path = tmp_path_factory.mktemp("backing") / "image"
    make_image(path, SIZE)
    return path


@pytest.fixture(params=FORMATS)
def leaf(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a leaf of each format will be."""
    return tmp_path / f"leaf.{request.param}"


def format_of(leaf: Path) -> str:
    return leaf.suffix.removeprefix(".")


def nbdstream(*args: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    command = [binary("NBDSTREAM"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@contextmanager
def client(uri: str) -> Iterator[nbd.NBD]:
    """A libnbd client that sees the three metadata contexts."""
    handle = nbd.NBD()
    for context in ("base:allocation", "qemu:allocation-depth", "nbdstream:local"):
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    yield handle
    handle.shutdown()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.01)


def check_clean(leaf: Path) -> None:
    """The leaf is clean by our own check and, where it has one, by QEMU's."""
    result = nbdstream("check", leaf)
    assert result.returncode == 0, result.stdout + result.stderr
    if format_of(leaf) != "raw":
        run([binary("QEMU_IMG"), "check", "-q", leaf])


def fetched_ranges(log: Path) -> list[tuple[int, int]]:
    """What nbdkit's log filter saw being read, in order of offset."""
    reads = re.findall(r"\bRead .*?offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log.read_text())
    return sorted((int(offset, 16), int(count, 16)) for offset, count in reads)


# -- the main job --------------------------------------------------------------------------


def test_a_leaf_becomes_local_and_lets_go_of_its_backing(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--exit-when-complete") as server:
            assert server.wait(60) == 0
        backing.kill()
    assert_same(leaf, image, format_of(leaf))
    check_clean(leaf)
    assert "the whole image is local" in nbdstream("info", leaf).stdout
    with nbdstream_serve(leaf) as server:
        assert_same(server.uri, image)


def test_what_is_complete_has_no_connection_and_no_helper(
    leaf: Path, image: Path, tmp_path: Path
) -> None:
    """They used to stay, reconnect for ever, and log."""
    control = tmp_path / "control"
    with nbdkit("file", image, readonly=True) as backing:
        with (
            nbdstream_serve(leaf, backing.uri, "--control", str(control)) as server,
            Qmp(control) as qmp,
        ):
            wait_for(lambda: not connections_to(backing.process.pid), "hanging up")
            assert "backing" not in qmp.execute("x-nbdstream-stats")
            assert_same(server.uri, image)
    other = leaf.with_name(f"other{leaf.suffix}")
    with nbdstream_serve(other, str(image)) as server:  # a file: nbdkit is our helper
        wait_for(lambda: not children(server.process.pid), "end of the helper")
        assert_same(server.uri, image)


def connections_to(pid: int) -> list[str]:
    """The established connections of a process, by /proc."""
    sockets = {link for link in links(pid) if link.startswith("socket:")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "unix")]
    established = []
    for line in "".join(tables).splitlines():
        words = line.split()
        if words[3:4] == ["01"]:  # TCP_ESTABLISHED
            established += [words[9]] if f"socket:[{words[9]}]" in sockets else []
        elif words[5:6] == ["03"]:  # SS_CONNECTED
            established += [words[6]] if f"socket:[{words[6]}]" in sockets else []
    return established


def links(pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return found


def test_a_backing_that_another_tool_recorded_is_used_once_the_user_has_named_it(
    image: Path, tmp_path: Path
) -> None:
    """QEMU's leaves name their backing's format, and its path from where they are. But who
    made the image may be a stranger, and could name any file."""
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "base.qcow2"])
    leaf = tmp_path / "leaf.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", leaf])
    refused = nbdstream("serve", leaf, "--run", "true")
    assert refused.returncode == 2
    named = f"qcow2+{tmp_path}/base.qcow2"
    assert f"name it with -b {named}\n" in refused.stderr
    with nbdstream_serve(leaf, named, "--stream", "off") as server:
        assert_same(server.uri, image)
    with nbdstream_serve(leaf, None, "--stream", "off") as server:
        assert_same(server.uri, image)
    run(["qemu-img", "rebase", "-u", "-b", image, "-F", "raw", leaf])
    assert nbdstream("serve", leaf, "--run", "true").returncode == 2
    run(["qemu-img", "rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", leaf])
    assert "backing file: base.qcow2\n" in nbdstream("info", leaf).stdout
    with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
        assert server.wait(60) == 0
    assert_same(leaf, image, "qcow2")


def test_a_backing_of_unknown_format_is_asked_for(image: Path, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"  # which cannot tell formats other than raw
    command = ["qemu-img", "create", "-q", "-u", "-f", "qed", "-b", "base", "-F", "qcow2"]
    run([*command, leaf, str(32 * MIB)])
    done = nbdstream("serve", leaf, "--run", "true")
    assert done.returncode == 2
    assert "name it with -b" in done.stderr


def test_a_backing_file_is_found_from_any_directory(image: Path, leaf: Path) -> None:
    made = [binary("NBDSTREAM"), "create", str(leaf), "-b", image.name]
    subprocess.run(made, cwd=image.parent, check=True)
    with nbdstream_serve(leaf, None, "--stream", "off") as server:
        assert_same(server.uri, image)


def test_guests_read_and_write_while_it_streams(leaf: Path, image: Path, tmp_path: Path) -> None:
    expected = bytearray(image.read_bytes())
    with nbdkit(
        "file", image, "rdelay=5ms", filters=["delay"], threads=16, readonly=True
    ) as backing:
        with nbdstream_serve(leaf, backing.uri, "--exit-when-complete") as server:
            with client(server.uri) as guest:
                for number in range(200):
                    offset = number * 7919 * 13 % (SIZE - 9000)
                    if number % 3 == 0:
                        data = bytes([number + 1]) * (1 + number * 41 % 9000)
                        guest.pwrite(data, offset)
                        expected[offset : offset + len(data)] = data
                    elif number % 3 == 1:
                        assert guest.pread(5000, offset) == expected[offset : offset + 5000]
                    else:
                        guest.zero(4096 + number, offset, nbd.CMD_FLAG_NO_HOLE * (number % 2))
                        expected[offset : offset + 4096 + number] = bytes(4096 + number)
                guest.flush()
            assert server.wait(60) == 0
    reference = tmp_path / "expected"
    reference.write_bytes(expected)
    assert_same(leaf, reference, format_of(leaf))
    check_clean(leaf)


def test_nothing_is_fetched_twice_nor_any_hole(leaf: Path, image: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with nbdkit("file", image, f"logfile={log}", filters=["log"], readonly=True) as backing:
        # What comes once more at each opening is the fingerprint; take it out of the count.
        with nbdstream_serve(leaf, backing.uri, "--stream", "off"):
            pass
        log.write_text("")
        with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
            with client(server.uri) as guest:
                for offset in range(0, SIZE - 70000, 3 * MIB // 2):
                    guest.pread(70000, offset)
            assert server.wait(60) == 0
        ranges = fetched_ranges(log)
    assert ranges
    opening = set(sample_ranges_read(log))
    streamed = [r for r in ranges if r not in opening]
    reached = 0
    for offset, length in streamed:
        assert offset >= reached, f"fetched twice: {offset}"
        reached = offset + length
    assert_same(leaf, image, format_of(leaf))


def sample_ranges_read(log: Path) -> list[tuple[int, int]]:
    """The reads of a fingerprint: known places, all before anything else is read."""
    from nbdstream.backing.identity import sample_ranges

    return sample_ranges(SIZE)


def test_streaming_goes_on_after_a_crash(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--speed", "4M") as server:
            with client(server.uri) as guest:
                guest.pwrite(b"flushed" * 1000, 12 * MIB + 77)
                guest.flush()
                guest.pwrite(b"not flushed" * 1000, 20 * MIB)
            server.kill()
        with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
            with client(server.uri) as guest:
                assert guest.pread(7000, 12 * MIB + 77) == b"flushed" * 1000
            assert server.wait(60) == 0
    check_clean(leaf)
    expected = bytearray(image.read_bytes())
    expected[12 * MIB + 77 : 12 * MIB + 77 + 7000] = b"flushed" * 1000
    with nbdstream_serve(leaf, None, "--read-only") as server, client(server.uri) as guest:
        lost = slice(20 * MIB, 20 * MIB + 11000)
        found = b"".join(guest.pread(MIB // 2, at) for at in range(0, 24 * MIB, MIB // 2))
        assert found[: lost.start] == expected[: lost.start]
        assert found[lost.stop : 24 * MIB] == expected[lost.stop : 24 * MIB]


# QEMU knows nothing of the raw leaf's allocation map.
@pytest.mark.parametrize("leaf", [name for name in FORMATS if name != "raw"], indirect=True)
def test_a_stop_in_the_middle_leaves_a_leaf_that_qemu_can_use(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--speed", "4M") as server:
            with client(server.uri) as guest:
                guest.pread(MIB, 5 * MIB)
            assert server.terminate() == 0
        check_clean(leaf)
        assert_same(leaf, image, format_of(leaf))  # QEMU reads the rest from the backing


# -- what clients see ----------------------------------------------------------------------


def test_block_status_shows_what_is_local(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--stream", "off") as server:
            with client(server.uri) as guest:
                guest.cache(2 * MIB, 4 * MIB)
                guest.trim(MIB, 8 * MIB)
            found = run([binary("NBDINFO"), "--map=nbdstream:local", server.uri])
            local = [line.split()[:3] for line in found.splitlines()]
            assert ["4194304", "2097152", "1"] in local
            assert ["8388608", "1048576", "1"] in local
            assert sum(int(length) for _, length, _ in local) == SIZE
            depth = run([binary("NBDINFO"), "--map=qemu:allocation-depth", server.uri])
            assert re.search(r"4194304 +2097152 +1 +local", depth)
            run([binary("QEMU_IMG"), "map", "--output=json", "-f", "raw", server.uri])


def test_socket_activation_serves_the_tools_that_use_it(tmp_path: Path, image: Path) -> None:
    leaf, copy = tmp_path / "leaf.qcow2", tmp_path / "copy"
    with nbdkit("file", image, readonly=True) as backing:
        assert nbdstream("create", leaf, "-b", backing.uri).returncode == 0
        command = ["[", binary("NBDSTREAM"), "serve", str(leaf), "]"]
        assert f"export-size: {SIZE}" in run([binary("NBDINFO"), *command])
        run([binary("NBDCOPY"), *command, copy])
    assert_same(copy, image)


def test_a_command_is_run_and_its_status_is_ours(tmp_path: Path) -> None:
    leaf = tmp_path / "plain.raw"
    assert nbdstream("create", leaf, "--size", "1M").returncode == 0
    script = 'nbdinfo --size "$uri" && test -S "$unixsocket" && exit 7'
    result = nbdstream("serve", leaf, "--run", script)
    assert result.stdout.strip() == str(MIB)
    assert result.returncode == 7
    assert list(tmp_path.iterdir()) == [leaf]


def test_fio_verifies_what_it_wrote_while_it_streams(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, "rdelay=2ms", filters=["delay"], threads=16, readonly=True) as b:
        with nbdstream_serve(leaf, b.uri, "--speed", "8M") as server:
            run(
                [
                    *[binary("FIO"), "--name=verify", "--ioengine=nbd", f"--uri={server.uri}"],
                    # Blocks of 3 KiB: nearly every write covers a part of some cluster.
                    *["--rw=randwrite", "--bs=3k", "--iodepth=16", "--size=16M"],
                    *[
                        "--verify=crc32c",
                        "--verify_fatal=1",
                        "--verify_backlog=64",
                        "--verify_state_save=0",
                    ],
                    "--randseed=7",
                ]
            )
            assert server.terminate() == 0
        check_clean(leaf)


def test_a_read_only_export_changes_nothing(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        assert nbdstream("create", leaf, "-b", backing.uri).returncode == 0
        before = leaf.read_bytes()
        with nbdstream_serve(leaf, None, "--read-only") as server:
            assert_same(server.uri, image)
            with client(server.uri) as guest:
                guest.set_strict_mode(0)
                with pytest.raises(nbd.Error, match="not permitted"):
                    guest.pwrite(b"x" * 512, 0)
        assert leaf.read_bytes() == before


# -- trouble with the backing --------------------------------------------------------------


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
                qmp.execute("block-job-resume", device="disk0")
                time.sleep(0.5)  # let it run into errors for a while
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


def test_a_backing_by_qemu_nbd(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with qemu_nbd(image, "raw", readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--exit-when-complete") as server:
            assert server.wait(60) == 0
    # qemu-nbd rounds the size up to whole sectors, which this one is.
    assert_same(leaf, image, "qcow2")


# -- the end -------------------------------------------------------------------------------


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


# -- bad input -----------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    no_server = f"nbd+unix:///?socket={tmp_path}/nobody"
    cases = [
        (["serve", "new.qcow2"], 2, "does not exist"),
        (["serve", "new.qcow2", "-b", no_server], 1, "no server listens"),
        (["serve", "new.qcow2", "-b", "gopher://x/y"], 2, "unknown|gopher"),
        (["serve", "new.what", "-b", no_server], (1, 2), "format|no server"),
        (["create", "new.qcow2"], 2, "--size"),
        (["create", "new.qcow2", "--size", "12x"], 2, "12x"),
        (["create", "new.qcow2", "--size", "0"], 2, "0 bytes"),
        (["create", "new.xyz", "--size", "1M"], 2, "format"),
        (["create", "new.qcow2", "--size", "1M", "--cluster-size", "1000"], 2, "cluster"),
        (["create", "nowhere/new.qcow2", "--size", "1M"], 1, "No such file"),
        (["info", "missing.raw"], 1, "missing.raw: No such file"),
        (["serve", "missing.raw", "-U", "a", "--listen", "b:1"], 2, "one of"),
        (["serve", "missing.raw", "--listen", "nonsense"], 2, "HOST:PORT"),
        (["serve", "missing.raw", "--tls", "require"], 2, "--tls-certificates"),
        (["serve", "missing.raw", "--tls-verify-peer"], 2, "--tls-certificates"),
        (
            [
                "serve",
                "missing.raw",
                "--tls",
                "off",
                "--tls-certificates",
                "a",
                "--tls-verify-peer",
            ],
            2,
            "--tls off",
        ),
        (["serve", "missing.raw", "--tls-certificates", "a"], 2, "server-cert.pem"),
    ]
    for command, status, pattern in cases:
        done = subprocess.run(
            [binary("NBDSTREAM"), *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        allowed = status if isinstance(status, tuple) else (status,)
        assert done.returncode in allowed, (command, done.stderr)
        assert re.search(pattern, done.stderr), (command, done.stderr)
        assert "Traceback" not in done.stderr
        # Ours are one line; click shows the usage before its own.
        assert done.stderr.count("\n") == 1 or "Usage:" in done.stderr, (command, done.stderr)
        assert list(tmp_path.iterdir()) == [], command


def test_a_leaf_in_use_is_refused(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--stream", "off") as server:
            result = nbdstream("serve", leaf, "-U", "-")
            assert result.returncode == 1
            assert re.match(r"nbdstream: error: .*in use", result.stderr)
            write = [binary("QEMU_IO"), "-f", format_of(leaf), "-c", "write 0 512", str(leaf)]
            refused = subprocess.run(write, capture_output=True, text=True, check=False)
            assert refused.returncode == 1
            assert "lock" in refused.stderr
            assert server.process.poll() is None


def test_a_damaged_map_is_refused_and_left_alone(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdkit("file", image, readonly=True) as backing:
        assert nbdstream("create", leaf, "-b", backing.uri).returncode == 0
        allocation = tmp_path / "leaf.raw.map"
        damaged = bytearray(allocation.read_bytes())
        damaged[20] ^= 1
        allocation.write_bytes(damaged)
        result = nbdstream("serve", leaf, "-U", "-")
        assert result.returncode == 1
        assert result.stderr.startswith("nbdstream: error: ")
        assert "damaged" in result.stderr
        assert allocation.read_bytes() == damaged


def test_a_read_only_directory(tmp_path: Path, image: Path) -> None:
    if os.geteuid() == 0:
        directory = Path("/proc/self")  # where not even root can create a file
    else:
        directory = tmp_path
        directory.chmod(0o500)
    with nbdkit("file", image, readonly=True) as backing:
        result = nbdstream("serve", directory / "leaf.raw", "-b", backing.uri, "-U", "-")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1


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
                qmp.execute("block-job-resume", device="disk0")
            assert server.wait(60) == 0
    assert_same(leaf, image, image_format)


def test_qemu_reads_a_leaf_whose_backing_is_no_raw_image(tmp_path: Path, image: Path) -> None:
    packed, leaf = tmp_path / "packed.qcow2", tmp_path / "leaf.qcow2"
    run([binary("QEMU_IMG"), "convert", "-q", "-O", "qcow2", image, packed])
    with nbdkit("file", packed, readonly=True) as backing:
        assert nbdstream("create", leaf, "-b", f"qcow2+{backing.uri}").returncode == 0
        with nbdstream_serve(leaf, None, "--stream", "off") as server:
            assert_same(server.uri, image)
            assert server.terminate() == 0
        found = run([binary("QEMU_IMG"), "info", leaf])
        assert f"backing file: {backing.uri}\n" in found
        assert "backing file format: qcow2" in found
        assert_same(leaf, image, "qcow2")


@pytest.mark.parametrize("runtime", [True, False])
def test_the_default_socket_is_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: bool
) -> None:
    leaf = tmp_path / "a disk.raw"
    assert nbdstream("create", leaf, "--size", "1M").returncode == 0
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with temporary_directory() as directory:
        directory.chmod(0o700)
        if runtime:
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
        command = [binary("NBDSTREAM"), "serve", str(leaf)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            with client(uri) as guest:
                assert guest.get_size() == MIB
            socket = Path(unquote(uri.partition("socket=")[2]))
            assert socket.stat().st_mode & 0o777 == 0o600
            assert socket.parent.stat().st_mode & 0o777 == 0o700
            if runtime:
                assert socket == directory / "nbdstream" / "a disk.raw.sock"
            process.terminate()
        assert process.returncode == 0
