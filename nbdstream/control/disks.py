# SPDX-License-Identifier: Apache-2.0
"""QMP commands for the disk: query-block as QEMU has it, and nbdstream's own.

``x-nbdstream-stream`` is the stepwise interface that was argued out in 2010 ("stream
DEVICE OFFSET", which tells how much was streamed), ``x-nbdstream-copy-on-read`` the
switch that it wanted to be a runtime option.
"""

import trio

from nbdstream.control.jobs import NOTHING_TO_STREAM, non_negative
from nbdstream.control.report import statistics
from nbdstream.control.table import command
from nbdstream.disk import StreamedDisk
from nbdstream.leaf.base import State
from nbdstream.leaf.map import image_info
from nbdstream.qmp.protocol import DeviceNotFound, GenericError, JSONObject
from nbdstream.streamer.job import StreamJob

# Extents in one answer to x-nbdstream-map: asked for by default, and at the most.
MAP_LIMIT = 1024
MAP_MAXIMUM = 65536
# Extents that are looked at before other tasks get their turn.
EXTENTS_AT_ONCE = 256

# QEMU's BlockDeviceInfo has these whether or not they are in use.
_NO_THROTTLING = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


class DiskCommands:
    """Describes the disk ``device`` and changes what can be changed while it is served."""

    def __init__(self, disk: StreamedDisk, job: StreamJob | None, device: str) -> None:
        self._disk = disk
        self._job = job
        self._device = device

    def _inserted(self) -> JSONObject:
        """The leaf as QEMU's BlockDeviceInfo."""
        disk, leaf = self._disk, self._disk.leaf
        inserted: JSONObject = {
            "file": leaf.path,
            "node-name": self._device,
            "drv": leaf.format,
            "ro": disk.read_only,
            "encrypted": False,
            "detect_zeroes": disk.detect_zeroes.value,
            "cache": {"writeback": True, "direct": False, "no-flush": False},
            "write_threshold": 0,
            "backing_file_depth": 0,
            "image": image_info(leaf) | {"dirty-flag": leaf.dirty},
        }
        if leaf.backing is not None:
            inserted |= {"backing_file": leaf.backing.uri, "backing_file_depth": 1}
        return inserted | _NO_THROTTLING

    @command("query-named-block-nodes")
    async def query_named_block_nodes(self, flat: bool = False) -> list[JSONObject]:
        """The leaf: it is the only node that commands can name. ``flat`` makes no difference."""
        return [self._inserted()]

    @command("query-block")
    async def query_block(self) -> list[JSONObject]:
        return [
            {
                "device": self._device,
                "type": "unknown",
                "locked": False,
                "removable": False,
                "inserted": self._inserted(),
            }
        ]

    @command("x-nbdstream-stats")
    async def stats(self) -> JSONObject:
        return statistics(self._disk, self._job)

    @command("x-nbdstream-map")
    async def map(
        self, offset: int = 0, length: int | None = None, limit: int = MAP_LIMIT
    ) -> JSONObject:
        """What is local, in ``length`` bytes from ``offset`` on (None: to the end of the disk), as
        at most ``limit`` extents. ``next``: where to ask for the rest.

        Raises:
            GenericError: an argument is out of its range.
            BackingError: the backing does not tell its block status.
        """
        self._check_offset(offset)
        if not 1 <= limit <= MAP_MAXIMUM:
            raise GenericError(f"Parameter 'limit' expects a value from 1 to {MAP_MAXIMUM}")
        rest = self._disk.size - offset
        length = rest if length is None else min(non_negative("length", length), rest)
        if length == 0:
            return {"extents": []}
        extents = await _longest(self._disk, offset, offset + length, limit)
        answer: JSONObject = {"extents": extents}
        end = extents[-1]["start"] + extents[-1]["length"]
        return answer | ({"next": end} if end < offset + length else {})

    @command("x-nbdstream-stream")
    async def stream(self, device: str, offset: int, length: int = 0) -> JSONObject:
        """Make the cluster at ``offset`` local, and those that ``length`` reaches.

        ``streamed``: bytes that were not local before. ``next``: the first offset behind
        the piece that is still remote, if there is one; so a loop over ``next`` streams
        the disk.

        Raises:
            DeviceNotFound: no disk has this name.
            GenericError: there is no stream job, or an argument is out of its range.
            BackingError, LeafError, OSError: the piece could not be fetched or stored.
        """
        if device != self._device:
            raise DeviceNotFound(f"Cannot find device='{device}'")
        if self._job is None:
            raise GenericError(NOTHING_TO_STREAM)
        self._check_offset(offset)
        streamed = await self._job.step(offset, non_negative("length", length))
        answer: JSONObject = {"streamed": streamed}
        following = await self._disk.next_unallocated(offset)
        return answer | ({"next": following.offset} if following is not None else {})

    @command("x-nbdstream-copy-on-read")
    async def copy_on_read(self, enable: bool) -> None:
        """Keep what guests read, or not. Raises GenericError if the leaf keeps nothing."""
        if enable and self._disk.thin:
            raise GenericError("The leaf is thin: nothing is copied into it")
        self._disk.copy_on_read = enable

    def _check_offset(self, offset: int) -> None:
        if not 0 <= offset < self._disk.size:
            raise GenericError(
                f"Parameter 'offset' is {offset}, which is not on a disk of {self._disk.size} bytes"
            )


async def _longest(disk: StreamedDisk, offset: int, end: int, limit: int) -> list[JSONObject]:
    """The first ``limit`` of the longest extents that tile the range, named as qemu-img map
    names them. Where in the leaf's file they lie does not matter here, so that pieces
    which were streamed in any order join again."""
    found: list[JSONObject] = []
    # One more than asked for shows that the last one is as long as it can be.
    while offset < end and len(found) <= limit:
        for extent in await disk.leaf_extents(offset, end - offset, EXTENTS_AT_ONCE):
            present, zero = extent.state is not State.UNALLOCATED, extent.state is State.ZERO
            if found and (found[-1]["present"], found[-1]["zero"]) == (present, zero):
                found[-1]["length"] += extent.length
            else:
                piece = {"start": extent.offset, "length": extent.length}
                kind = {"present": present, "zero": zero, "data": present and not zero}
                found.append(piece | kind)
            offset = extent.end
        await trio.lowlevel.checkpoint()
    return found[:limit]
