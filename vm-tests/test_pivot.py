# SPDX-License-Identifier: Apache-2.0
"""A guest that writes all the time goes on from its leaf; what it was told is durable is there."""

import os
import random
import subprocess
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from nbdstream.guest.console import Console
from nbdstream.guest.disks import Disk
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import ControlledServer, Monitor, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import GenericError
from nbdstream.tasks import open_background_nursery
from testbed.guests import systems
from testbed.migrations import arrangement, heartbeat
from testbed.migrations.arrangement import Ends, last_acknowledged, records
from testbed.peers import binary, nbdkit, nbdstream_serve, run
from testbed.pivots.trial import Trial

pytestmark = pytest.mark.timeout(300)

# Steps that fail in turn, in one guest, before the pivot that succeeds.
STEPS = ("stop", "x-nbdstream-let-go", "blockdev-add", "blockdev-reopen")
# The target is 50 ms on an idle machine; this one has other work, and its guest is emulated.
PAUSE_MOST = 1.0


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "qed"])
async def test_a_guest_goes_on_from_its_leaf(
    suffix: str,
    tmp_path: Path,
    busybox_image: Path,
    busybox_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends, leaf = Ends(tmp_path, busybox_image), tmp_path / f"leaf.{suffix}"
    beats = heartbeat.Heartbeat()
    execute = QMPClient.execute

    async def attempt(qmp: Monitor, disk: PivotDisk, step: str) -> None:
        """Fail at a step after it was carried out."""

        async def fail(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
            answer = await execute(self, name, *args, **more)
            if name == step and step != "blockdev-reopen":
                raise GenericError("told to fail")
            return answer

        async def fail_before(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
            if name == step:
                raise GenericError("told to fail")
            return await execute(self, name, *args, **more)

        monkeypatch.setattr(QMPClient, "execute", fail_before if "reopen" in step else fail)
        with pytest.raises(PivotError, match=r"as before|cannot open"):
            await pivot(qmp, [disk])
        monkeypatch.setattr(QMPClient, "execute", execute)

    with nbdkit("file", busybox_disk, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri) as server:
            disk = PivotDisk(ControlledServer(str(server.control)))
            qmp = Monitor.at(ends.path("source.qmp"))
            async with (
                arrangement.source(ends, Disk.nbd(server.uri)) as guest,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(beats.listen, ends.path("source.heartbeat"), ends.path("none"))
                await guest.console.send(heartbeat.LOOP + "\n")
                await wait_local(str(server.control))
                for step in STEPS:
                    await attempt(qmp, disk, step)
                    seen = last_acknowledged(guest.console.transcript)
                    await guest.console.wait_for(rf"ACK {seen + 2}\b", 60)
                await beats.wait_here(20)
                first = len(beats.here)
                stopped = await pivot(qmp, [disk])
                await beats.wait_here(first + 20)
                pause = longest(beats.here[first - 1 :])
                usual = longest(beats.here[:first])
                print(f"{suffix}: stopped {stopped:.3f} s, silent {pause:.3f} s, else {usual:.3f}")
                assert stopped < PAUSE_MOST
                seen = last_acknowledged(guest.console.transcript)
                await guest.console.wait_for(rf"ACK {seen + 5}\b", 60)
                await guest.guest.kill()
                nursery.cancel_scope.cancel()
            text = guest.console.transcript
    assert "I/O error" not in text
    raw = leaf.with_suffix(".look")
    run(["qemu-img", "convert", "-f", suffix, "-O", "raw", leaf, raw])
    assert records(raw) >= last_acknowledged(text) > 3


def longest(beats: list[heartbeat.Beat]) -> float:
    """The longest time between two beats."""
    return max(after.heard - before.heard for before, after in pairwise(beats))


async def wait_local(control: str) -> None:
    with trio.fail_after(120):
        while True:
            async with QMPClient.connect(control) as qmp:
                if "backing" not in await qmp.execute("x-nbdstream-stats"):
                    return
            await trio.sleep(0.1)


async def test_boot_leaves_the_guest_to_its_leaf(tmp_path: Path, busybox_image: Path) -> None:
    """By default, without a word of it to the guest's terminal; the exit status is QEMU's."""
    leaf, image = tmp_path / "leaf.qcow2", busybox_image / "disk.raw"
    kernel = systems.direct_boot(busybox_image)
    command = [binary("NBDSTREAM"), "boot", f"file://{image}", "--leaf", str(leaf), "-m", "256M"]
    process = await trio.lowlevel.open_process(
        [*command, "--", "-no-reboot", *kernel],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    async with open_background_nursery() as nursery:
        console = Console(trio.StapledStream(process.stdin, process.stdout))
        nursery.start_soon(console.pump)
        await console.wait_for(systems.BUSYBOX.prompt, systems.BOOT_TIMEOUT)
        with trio.fail_after(120):
            while leaf in files_of(process.pid):  # noqa: ASYNC110
                await trio.sleep(0.1)
        await console.run("echo kept > /root/note && sync && cd /data && sha256sum -c SHA256SUMS")
        await console.send(f"{systems.BUSYBOX.power_off}\n")
        assert await process.wait() == 0
        (words,) = (await process.stderr.receive_some()).decode().splitlines()
        assert words.endswith("; pivoted, the guest uses its disk without nbdstream")
    systems.check_filesystem(leaf, "qcow2")


def files_of(pid: int) -> list[Path]:
    """The files that a process has open."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(fd.readlink())
    return found


async def test_pivots_that_are_struck_lose_nothing(busybox_image: Path) -> None:
    """A sample of ``python -m testbed.pivots``: tool, server and QEMU killed at random steps."""
    seed = int(os.environ.get("NBDSTREAM_SEED", time.time()))
    trial = Trial(busybox_image, "qcow2", random.Random(seed))
    try:
        assert await trial.run(attempts=3) > 3
    finally:
        print(f"seed {seed}", *trial.attempts, sep="\n")
