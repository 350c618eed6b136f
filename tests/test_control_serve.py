# SPDX-License-Identifier: Apache-2.0
"""The control socket of a real ``nbdstream serve``, with nbdkit as its remote."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPConnectionError
from testbed.peers import Peer, Qmp, binary, nbdkit, nbdstream_serve, run

SIZE = 8 << 20
CLUSTER = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "remote.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def remote(image: Path) -> Iterator[Peer]:
    with nbdkit("file", image, readonly=True) as peer:
        yield peer


@pytest.fixture
def server(tmp_path: Path, remote: Peer) -> Iterator[Peer]:
    """A server that streams nothing by itself."""
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, remote.uri, "--stream", "off", export="disk0") as peer:
        yield peer


async def test_a_remote_image_becomes_local_step_by_step_and_then_at_once(
    tmp_path: Path, image: Path, server: Peer
) -> None:
    assert server.control is not None
    async with QMPClient.connect(server.control) as qmp:
        (block,) = await qmp.execute("query-block")
        device = block["device"]
        assert block["inserted"]["image"]["virtual-size"] == SIZE
        step = {"device": device, "offset": 3 * CLUSTER, "length": 2 * CLUSTER}
        assert await qmp.execute("x-nbdstream-stream", step) == {
            "streamed": 2 * CLUSTER,
            "next": 5 * CLUSTER,
        }
        extents = (await qmp.execute("x-nbdstream-map"))["extents"]
        local = [(e["start"], e["length"]) for e in extents if e["present"]]
        assert local == [(3 * CLUSTER, 2 * CLUSTER)]
        assert as_nbdinfo_has_it(server) == [(e["start"], e["length"]) for e in extents]

        await qmp.execute("block-stream", {"device": device})
        with trio.fail_after(30):
            done = await qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert done.data["offset"] == SIZE and "error" not in done.data
        stats = await qmp.execute("x-nbdstream-stats")
        assert stats["disk"]["fetched-bytes"] == SIZE and "backing" not in stats
        await qmp.execute("quit")
        with trio.fail_after(30), pytest.raises(QMPConnectionError):
            while True:
                await qmp.wait_event()
    assert await trio.to_thread.run_sync(server.process.wait) == 0
    assert not server.control.exists()
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, tmp_path / "leaf.raw"])


def as_nbdinfo_has_it(server: Peer) -> list[tuple[int, int]]:
    """The extents of the context nbdstream:local, as an NBD client sees them."""
    text = run(["nbdinfo", "--map=nbdstream:local", "--json", server.uri])
    return [(each["offset"], each["length"]) for each in json.loads(text)]


def test_steps_in_a_loop_reach_the_end_of_a_disk_of_any_size(tmp_path: Path) -> None:
    """qcow2 counts sectors: a new leaf is longer than its backing of 1,000,000 bytes."""
    image, leaf = tmp_path / "remote.raw", tmp_path / "leaf.qcow2"
    image.write_bytes(os.urandom(1_000_000))
    with nbdkit("file", image, readonly=True) as remote:
        with nbdstream_serve(leaf, remote.uri, "--stream", "off") as server:
            assert server.control is not None
            with Qmp(server.control) as qmp:
                step = {"next": 0}
                while "next" in step:
                    step = qmp.execute("x-nbdstream-stream", device="disk0", offset=step["next"])
        run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, leaf])


def test_a_lost_backing_is_told_and_no_obstacle_to_looking(server: Peer, remote: Peer) -> None:
    assert server.control is not None
    remote.kill()
    with Qmp(server.control) as qmp:
        backing: dict[str, Any] = {}

        def lost() -> bool:
            backing.update(qmp.execute("x-nbdstream-stats")["backing"])
            return not backing["connected"]

        server.wait_until(lost, "the loss of its backing is told", 30)
        assert backing["last-error"]
        extents = qmp.execute("x-nbdstream-map")["extents"]
        assert sum(extent["length"] for extent in extents) == SIZE
        assert ", lost " in run(["nbdstream", "status", server.control])


def test_watch_sees_a_server_out_that_ends_when_complete(tmp_path: Path, remote: Peer) -> None:
    options = ("--stream", "paused", "--exit-when-complete")
    with nbdstream_serve(tmp_path / "leaf.raw", remote.uri, *options) as server:
        assert server.control is not None
        watch = subprocess.Popen(
            [binary("NBDSTREAM"), "watch", str(server.control)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with watch:
            assert watch.stderr is not None
            assert "paused" in watch.stderr.readline()
            run(["nbdstream", "resume", server.control])
            assert "100.0 % local" in watch.stderr.readlines()[-1]
        assert watch.returncode == 0
        assert server.process.wait(30) == 0


def test_qmp_shell_gets_along_with_it(server: Peer) -> None:
    """The shell of QEMU's own QMP library (qemu.qmp): it sends no line ends."""
    script = "query-version\nquery-block-jobs\nblock-job-pause device=absent\nnonsense\n"
    done = subprocess.run(
        [binary("QMP_SHELL"), str(server.control)],
        input=script,
        capture_output=True,
        text=True,
        timeout=30,
    )
    replies: list[dict[str, Any]] = []
    for line in done.stdout.splitlines():
        _, brace, text = line.partition("{")
        replies += [json.loads(brace + text)] if brace else []
    assert done.returncode == 0, done.stderr
    assert replies[0]["return"]["package"].startswith("nbdstream ")
    assert replies[1] == {"return": []}
    assert [reply["error"]["class"] for reply in replies[2:]] == [
        "DeviceNotActive",
        "CommandNotFound",
    ]
