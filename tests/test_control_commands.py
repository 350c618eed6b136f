# SPDX-License-Identifier: Apache-2.0
"""What each QMP command does to a real disk and job."""

from pathlib import Path
from typing import Any

import pytest

from nbdstream.errors import BackingReadError
from nbdstream.leaf.base import State
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import (
    CommandError,
    DeviceNotActive,
    DeviceNotFound,
    GenericError,
)
from nbdstream.streamer.job import JobStatus
from tests.control_room import DEVICE, ask, control_room
from tests.small_disk import CONTENT, SIZE

CLUSTER = 2048


# -- starting and steering the job ------------------------------------------------------------


async def test_a_job_runs_from_block_stream_to_its_completed_event(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room, QMPClient.connect(room.path) as qmp:
        await qmp.execute("block-stream", {"device": DEVICE, "speed": 1 << 20})
        event = await qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert event.data == {
            "type": "stream",
            "device": DEVICE,
            "len": SIZE,
            "offset": SIZE,
            "speed": 1 << 20,
        }
        await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "null"})
        assert await qmp.execute("query-block-jobs") == []
        assert room.leaf.backing is None
        stats = await qmp.execute("x-nbdstream-stats")
        assert "backing" not in stats
        assert stats["job"]["offset"] == SIZE and stats["job"]["remaining"] == 0
        assert stats["disk"]["fetched-bytes"] == SIZE
        with pytest.raises(GenericError, match="local already"):
            await qmp.execute("block-stream", {"device": DEVICE})


async def test_a_job_has_the_name_that_it_was_given(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room, QMPClient.connect(room.path) as qmp:
        await qmp.execute("block-stream", {"device": DEVICE, "job-id": "j1"})
        await qmp.wait_event("JOB_STATUS_CHANGE", data={"id": "j1", "status": "running"})
        assert [job["id"] for job in await qmp.execute("query-jobs")] == ["j1"]
        with pytest.raises(DeviceNotActive, match="Block job 'disk0' not found"):
            await qmp.execute("block-job-pause", {"device": DEVICE})
        await qmp.execute("block-job-cancel", {"device": "j1"})
        await qmp.wait_event("BLOCK_JOB_CANCELLED", data={"device": "j1"})
        await qmp.wait_event("JOB_STATUS_CHANGE", data={"id": "j1", "status": "null"})
        await qmp.execute("block-stream", {"device": DEVICE})
        assert [job["id"] for job in await qmp.execute("query-jobs")] == [DEVICE]


async def test_pause_resume_and_cancel(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room, QMPClient.connect(room.path) as qmp:
        await qmp.execute("block-stream", {"device": DEVICE})
        await qmp.execute("block-job-pause", {"device": DEVICE})
        assert room.status() is JobStatus.PAUSED
        (info,) = await qmp.execute("query-block-jobs")
        assert info["paused"] is True and info["busy"] is False and info["status"] == "paused"
        with pytest.raises(GenericError, match="already paused"):
            await qmp.execute("job-pause", {"id": DEVICE})
        with pytest.raises(GenericError, match="currently paused"):
            await qmp.execute("block-job-cancel", {"device": DEVICE})
        await qmp.execute("job-resume", {"id": DEVICE})
        assert room.status() is JobStatus.RUNNING
        with pytest.raises(GenericError, match="not paused"):
            await qmp.execute("block-job-resume", {"device": DEVICE})
        await qmp.execute("block-job-pause", {"device": DEVICE})
        await qmp.execute("block-job-cancel", {"device": DEVICE, "force": True})
        await qmp.wait_event("BLOCK_JOB_CANCELLED")
        await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "null"})
        with pytest.raises(DeviceNotActive):
            await qmp.execute("block-job-cancel", {"device": DEVICE})


async def test_the_speed_reaches_the_backing(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room, QMPClient.connect(room.path) as qmp:
        await qmp.execute("block-stream", {"device": DEVICE, "speed": 1000})
        assert room.backing.speed == 1000
        await qmp.execute("block-job-set-speed", {"device": DEVICE, "speed": 0})
        assert room.backing.speed == 0
        with pytest.raises(GenericError, match="'speed' expects a non-negative value"):
            await qmp.execute("block-job-set-speed", {"device": DEVICE, "speed": -1})


async def test_a_cap_stays_where_block_stream_names_none(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room:
        room.stream.set_speed(12345)
        await ask(room, "block-stream", device=DEVICE)
        assert room.stream.speed == 12345


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ({"device": "other"}, DeviceNotFound, "other"),
        ({"device": DEVICE, "job-id": ""}, GenericError, "Invalid job ID ''"),
        ({"device": DEVICE, "speed": -1}, GenericError, "non-negative"),
        ({"device": DEVICE, "auto-dismiss": False}, GenericError, "dismisses itself"),
        ({"device": DEVICE, "on-error": "report"}, GenericError, "does not accept value 'report'"),
        ({"device": DEVICE, "base": "x"}, GenericError, "'base' is unexpected"),
    ],
)
async def test_a_job_that_cannot_be_is_refused(
    tmp_path: Path, arguments: dict[str, Any], kind: type[CommandError], complaint: str
) -> None:
    async with control_room(tmp_path) as room, QMPClient.connect(room.path) as qmp:
        with pytest.raises(kind, match=complaint):
            await qmp.execute("block-stream", arguments)
        assert room.status() is JobStatus.NULL


async def test_an_error_that_stops_the_job_is_told(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room, QMPClient.connect(room.path) as qmp:
        room.leaf.store_error = OSError(28, "No space left on device")
        await qmp.execute("block-stream", {"device": DEVICE})
        event = await qmp.wait_event("BLOCK_JOB_ERROR")
        assert event.data == {"device": DEVICE, "operation": "write", "action": "stop"}
        await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "paused"})
        (info,) = await qmp.execute("query-block-jobs")
        assert info["io-status"] == "nospace" and "No space left" in info["error"]
        (info,) = await qmp.execute("query-jobs")
        assert "No space left" in info["error"]
        room.leaf.store_error = None
        await qmp.execute("block-job-resume", {"device": DEVICE})
        await qmp.wait_event("BLOCK_JOB_COMPLETED")


async def test_a_plain_local_disk_has_no_job(tmp_path: Path) -> None:
    async with control_room(tmp_path, backing=False) as room, QMPClient.connect(room.path) as qmp:
        assert await qmp.execute("query-block-jobs") == await qmp.execute("query-jobs") == []
        for name, arguments in (
            ("block-stream", {"device": DEVICE}),
            ("x-nbdstream-stream", {"device": DEVICE, "offset": 0}),
        ):
            with pytest.raises(GenericError, match="nothing to stream"):
                await qmp.execute(name, arguments)
        with pytest.raises(DeviceNotActive):
            await qmp.execute("block-job-pause", {"device": DEVICE})
        facts = {"size", "copy-on-read", "owner", "disk"}
        assert (await qmp.execute("x-nbdstream-stats")).keys() == facts
        (block,) = await qmp.execute("query-block")
        assert block["inserted"]["backing_file_depth"] == 0


# -- the disk --------------------------------------------------------------------------------


async def test_steps_stream_the_disk(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room, QMPClient.connect(room.path) as qmp:
        offset: int | None = 0
        total = steps = 0
        while offset is not None:
            step = await qmp.execute("x-nbdstream-stream", {"device": DEVICE, "offset": offset})
            total, steps, offset = total + step["streamed"], steps + 1, step.get("next")
        assert total == SIZE and steps == -(-SIZE // CLUSTER)
        assert set(room.leaf.states) <= {State.DATA, State.ZERO}
        assert room.backing.fetched_twice() == []


async def test_a_step_takes_whole_clusters_and_counts_what_was_missing(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        room.leaf.write(0, memoryview(CONTENT[:512]))
        step = await ask(room, "x-nbdstream-stream", device=DEVICE, offset=100, length=CLUSTER)
        assert step == {"streamed": 2 * CLUSTER - 512, "next": 2 * CLUSTER}
        again = await ask(room, "x-nbdstream-stream", device=DEVICE, offset=100, length=CLUSTER)
        assert again == {"streamed": 0, "next": 2 * CLUSTER}
        last = await ask(room, "x-nbdstream-stream", device=DEVICE, offset=SIZE - 1)
        assert last == {"streamed": SIZE % CLUSTER}


@pytest.mark.parametrize("offset", [-1, SIZE, 2**62])
async def test_a_step_must_be_on_the_disk(tmp_path: Path, offset: int) -> None:
    async with control_room(tmp_path) as room:
        with pytest.raises(GenericError, match=f"'offset' is {offset}, which is not on a disk"):
            await ask(room, "x-nbdstream-stream", device=DEVICE, offset=offset)


async def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        room.backing.error = BackingReadError("the remote disk is on fire")
        with pytest.raises(GenericError, match="the remote disk is on fire"):
            await ask(room, "x-nbdstream-stream", device=DEVICE, offset=0)


async def test_copy_on_read_is_a_switch(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        for enable, state in ((False, State.UNALLOCATED), (True, State.DATA)):
            await ask(room, "x-nbdstream-copy-on-read", enable=enable)
            assert (await ask(room, "x-nbdstream-stats"))["copy-on-read"] is enable
            await room.disk.read(memoryview(bytearray(512)), 0)
            assert room.leaf.states[0] is state


async def test_the_map_tells_local_from_remote_without_the_backing(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        room.leaf.write(CLUSTER, memoryview(CONTENT[CLUSTER : 2 * CLUSTER]))
        room.leaf.zero(3 * CLUSTER, CLUSTER, unmap=True)
        room.backing.error = BackingReadError("gone")
        whole = await ask(room, "x-nbdstream-map")
        assert "next" not in whole
        kinds = [
            (e["start"], e["length"], e["present"], e["zero"], e["data"]) for e in whole["extents"]
        ]
        assert kinds == [
            (0, CLUSTER, False, False, False),
            (CLUSTER, CLUSTER, True, False, True),
            (2 * CLUSTER, CLUSTER, False, False, False),
            (3 * CLUSTER, CLUSTER, True, True, False),
            (4 * CLUSTER, SIZE - 4 * CLUSTER, False, False, False),
        ]
        paged: list[Any] = []
        offset: int | None = 0
        while offset is not None:
            page = await ask(room, "x-nbdstream-map", offset=offset, limit=2)
            paged, offset = paged + page["extents"], page.get("next")
        assert paged == whole["extents"]
        part = await ask(room, "x-nbdstream-map", offset=100, length=CLUSTER)
        assert [(e["start"], e["length"]) for e in part["extents"]] == [
            (100, CLUSTER - 100),
            (CLUSTER, 100),
        ]


@pytest.mark.parametrize(
    "arguments", [{"offset": -1}, {"offset": SIZE}, {"length": -1}, {"limit": 0}, {"limit": 10**6}]
)
async def test_a_map_of_nothing_sensible_is_refused(
    tmp_path: Path, arguments: dict[str, int]
) -> None:
    async with control_room(tmp_path) as room:
        with pytest.raises(GenericError, match=f"'{next(iter(arguments))}'"):
            await ask(room, "x-nbdstream-map", **arguments)


async def test_stats_tell_of_misses_and_of_the_backing(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        await room.disk.read(memoryview(bytearray(512)), 0)
        stats = await ask(room, "x-nbdstream-stats")
        assert stats["disk"]["demand-misses"] == 1
        assert stats["disk"]["fetched-bytes"] == CLUSTER
        assert stats["backing"]["uri"] == "memory:" and stats["backing"]["connected"] is True
        assert stats["job"]["status"] == "null" and "eta" not in stats["job"]


async def test_quit_stops_the_server(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        assert not room.stopped.is_set()
        assert await ask(room, "quit") == {}
        assert room.stopped.is_set()


async def test_query_commands_lists_what_there_is(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        names = {entry["name"] for entry in await ask(room, "query-commands")}
        assert {"block-stream", "job-cancel", "query-commands", "quit", "x-nbdstream-map"} <= names
