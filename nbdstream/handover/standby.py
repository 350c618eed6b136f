# SPDX-License-Identifier: Apache-2.0
"""The destination's side: a leaf that stands by until the source is sealed.

What must hold: nothing is kept of a source that may still be written. A leaf that was
created for standing by says so in itself (`STANDBY` in place of its backing's identity),
so that a later process does not take it for a disk either. `activate` finds out what the
sealed source is, records that durably, and only then lets copy on read and streaming begin.
"""

from dataclasses import replace

from nbdstream.control.table import command
from nbdstream.disk import StreamedDisk
from nbdstream.handover.generation import STANDBY, generation_of
from nbdstream.qmp.protocol import GenericError, JSONObject
from nbdstream.streamer.job import StreamJob


class Standby:
    """The commands of a disk that was started to stand by. ``stream`` is what becomes of its
    job once it is active, as in `nbdstream.service.ServeOptions`."""

    def __init__(self, disk: StreamedDisk, job: StreamJob | None, stream: str) -> None:
        self._disk = disk
        self._job = job
        self._stream = stream
        backing = disk.leaf.backing
        self._generation = generation_of(backing.uri) if backing is not None else ""

    @command("x-nbdstream-standby-query")
    async def query(self) -> JSONObject:
        """The generation that the leaf was made for, also once it is local; or the empty
        object."""
        return {"generation": self._generation} if self._generation else {}

    @command("x-nbdstream-activate")
    async def activate(self, generation: str, size: int, check: bool = False) -> JSONObject:
        """The source is sealed as this generation: from now on this is the disk.

        Args:
            generation, size: what the source sealed; the leaf must have been made for it.
            check: change nothing, only find out whether the arguments fit.

        Raises:
            GenericError: they do not fit.
            BackingError: the source does not answer; the disk goes on standing by.
            OSError: the leaf's record cannot be written; likewise.
        """
        backing, leaf = self._disk.backing, self._disk.leaf
        if backing is None or leaf.backing is None or leaf.backing.identity != STANDBY:
            raise GenericError("this disk does not stand by")
        offered = generation_of(leaf.backing.uri)
        # Not the size of `backing`: below a leaf of whole sectors that may be padded.
        expected = leaf.backing.size
        if offered != generation or expected != size:
            raise GenericError(
                f"this disk stands by for generation {offered or 'unknown'}, {expected} bytes; "
                f"the source has {generation}, {size} bytes"
            )
        if check:
            return {"generation": generation}
        backing.forget()
        identity = await backing.pin()
        record = replace(leaf.backing, size=size, identity=identity)
        await self._disk.record_backing(record)
        self._disk.activate()
        if self._job is not None and self._stream != "off":
            self._job.start(paused=self._stream == "paused")
        return {"generation": generation, "identity": identity}
