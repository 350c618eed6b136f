# SPDX-License-Identifier: Apache-2.0
"""A guest that writes all the time goes on from its leaf; what it was told is durable is there."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import ControlledServer, Monitor, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import GenericError
from testbed.migrations import arrangement, pulse
from testbed.migrations.arrangement import Ends, last_acknowledged, records
from testbed.peers import nbdkit, nbdstream_serve, run

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
    beats = pulse.Pulse()
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
                nursery.start_soon(beats.listen, ends.path("source.pulse"), ends.path("none"))
                await guest.console.send(pulse.LOOP + "\n")
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


def longest(beats: list[pulse.Beat]) -> float:
    """The longest time between two beats."""
    return max(after.heard - before.heard for before, after in pairwise(beats))


async def wait_local(control: str) -> None:
    with trio.fail_after(120):
        while True:
            async with QMPClient.connect(control) as qmp:
                if "backing" not in await qmp.execute("x-nbdstream-stats"):
                    return
            await trio.sleep(0.1)
