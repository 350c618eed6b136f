# SPDX-License-Identifier: Apache-2.0
"""``nbdstream serve`` as its users meet it: real backings and real clients."""

import json
import random
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import nbd
import pytest

from testbed.peers import (
    Qmp,
    assert_same,
    binary,
    nbdkit,
    nbdstream_serve,
    qemu_nbd,
    run,
)
from testbed.processes import children
from tests.serve_support import (
    FORMATS,
    MIB,
    SIZE,
    check_clean,
    client,
    fetched_ranges,
    format_of,
    image_file,
    leaf_path,
    nbdstream,
    wait_for,
)

pytestmark = pytest.mark.timeout(120)

image = pytest.fixture(image_file, scope="session")
leaf = pytest.fixture(leaf_path, params=FORMATS)


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


def test_a_killed_server_loses_nothing(leaf: Path, image: Path) -> None:
    """Each of several servers is killed after writes and zeroes that were not flushed, over what
    is local and what is not. The stream goes on where it was."""
    expected = bytearray(image.read_bytes())
    rng = random.Random(4)

    def put(guest: nbd.NBD, offset: int, data: bytes) -> None:
        expected[offset : offset + len(data)] = data
        if any(data):
            guest.pwrite(data, offset)
        else:
            guest.zero(len(data), offset, flags=rng.choice((0, nbd.CMD_FLAG_NO_HOLE)))

    with nbdkit("file", image, readonly=True) as backing:
        for _ in range(4):
            uri = None if leaf.exists() else backing.uri
            with nbdstream_serve(leaf, uri, "--speed", "4M") as server, client(server.uri) as guest:
                for _ in range(40):
                    length = rng.choice((512, 4096, 70_000, 300_000))
                    offset = rng.randrange(SIZE - length)
                    if rng.random() < 0.3:
                        guest.pread(4096, offset)  # copied on read, then written over
                    put(guest, offset, (bytes if rng.random() < 0.2 else rng.randbytes)(length))
                server.kill()
        with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
            assert server.wait(60) == 0
    check_clean(leaf)
    with nbdstream_serve(leaf, None, "--read-only") as server, client(server.uri) as guest:
        for at in range(0, SIZE, MIB):
            length = min(MIB, SIZE - at)
            assert guest.pread(length, at) == expected[at : at + length], at


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


def test_lists_of_exports_show_name_and_description(tmp_path: Path) -> None:
    words = ("--description", "of my web server")
    run([binary("NBDSTREAM"), "create", tmp_path / "leaf.raw", "--size", "1M"])
    with nbdstream_serve(tmp_path / "leaf.raw", None, *words, export="disk0") as server:
        socket = f"nbd+unix:///?socket={server.socket}"
        listed = json.loads(run(["nbdinfo", "--json", "--list", socket]))["exports"]
        assert [(each["export-name"], each["description"]) for each in listed] == [
            ("disk0", "of my web server")
        ]


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


def test_a_backing_by_qemu_nbd(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with qemu_nbd(image, "raw", readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--exit-when-complete") as server:
            assert server.wait(60) == 0
    # qemu-nbd rounds the size up to whole sectors, which this one is.
    assert_same(leaf, image, "qcow2")


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
