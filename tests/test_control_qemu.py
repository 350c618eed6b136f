# SPDX-License-Identifier: Apache-2.0
"""A client cannot tell our control socket from that of QEMU's storage daemon."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import (
    CommandError,
)
from testbed.peers import qemu_storage_daemon, run
from tests.control_room import DEVICE, control_room


async def attempt(qmp: QMPClient, command: str, /, **arguments: Any) -> Any:
    """What a command returns, by shape: types instead of values; an error by its class."""
    try:
        value = await qmp.execute(command, arguments)
    except CommandError as error:
        return error.error_class
    return shape(value)


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return value if isinstance(value, (str, bool)) else type(value).__name__


async def session(qmp: QMPClient, let_it_finish: Callable[[], None]) -> list[Any]:
    """The life of a stream job, as one client sees it."""
    seen: list[Any] = []
    seen.append(await attempt(qmp, "query-block-jobs"))
    seen.append(await attempt(qmp, "block-job-pause", device="job0"))
    seen.append(await attempt(qmp, "job-pause", id="job0"))
    seen.append(await attempt(qmp, "block-stream"))
    seen.append(await attempt(qmp, "block-stream", device=5))
    seen.append(await attempt(qmp, "no-such-command"))
    arguments = {"device": DEVICE, "job-id": "job0", "speed": 1 << 16}
    await qmp.execute("block-stream", arguments)
    await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "running"})
    seen.append(await attempt(qmp, "block-job-complete", device="job0"))
    seen.append(await attempt(qmp, "block-job-set-speed", device="job0", speed=-1))
    seen.append(await attempt(qmp, "block-job-pause", device="job0"))
    await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "paused"})
    seen.append(await attempt(qmp, "query-block-jobs"))
    seen.append(await attempt(qmp, "query-jobs"))
    seen.append(await attempt(qmp, "block-job-pause", device="job0"))
    seen.append(await attempt(qmp, "block-job-cancel", device="job0"))
    seen.append(await attempt(qmp, "block-job-resume", device="job0"))
    await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "running"})
    seen.append(await attempt(qmp, "block-job-resume", device="job0"))
    seen.append(await attempt(qmp, "block-job-set-speed", device="job0", speed=0))
    let_it_finish()
    for event in ("JOB_STATUS_CHANGE", "JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED"):
        happened = await qmp.wait_event(event)
        seen.append((happened.name, shape(happened.data)))
    for _ in range(2):
        happened = await qmp.wait_event("JOB_STATUS_CHANGE")
        seen.append((happened.name, shape(happened.data)))
    seen.append(await attempt(qmp, "query-jobs"))
    seen.append(await attempt(qmp, "block-job-cancel", device="job0"))
    return seen


async def test_a_client_cannot_tell_us_from_qemu(tmp_path: Path) -> None:
    """The same session, with QEMU's storage daemon and with us: same replies and events."""
    base, leaf = tmp_path / "base.raw", tmp_path / "leaf.qcow2"
    base.write_bytes(b"\x55" * (2 << 20))
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", leaf])
    blockdev = f"driver=qcow2,node-name=disk0,file.driver=file,file.filename={leaf}"
    with qemu_storage_daemon("--blockdev", blockdev) as daemon:
        assert daemon.control is not None
        async with QMPClient.connect(daemon.control) as qmp:
            with trio.fail_after(30):
                # At 64 KiB a second its job lasts until the session lifts the cap.
                theirs = await session(qmp, lambda: None)

    async with control_room(tmp_path, gated=True) as room, QMPClient.connect(room.path) as qmp:

        def let_it_finish() -> None:
            room.backing.gated = False
            for read in room.backing.waiting:
                read.gate.set()

        ours = await session(qmp, let_it_finish)
    assert ours == theirs
