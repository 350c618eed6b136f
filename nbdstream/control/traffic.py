# SPDX-License-Identifier: Apache-2.0
"""What clients have asked of the disk, by QEMU's names (qapi/block-core.json: BlockDeviceStats)."""

from nbdstream.control.table import command
from nbdstream.qmp.protocol import JSONObject
from nbdstream.server.constants import Command
from nbdstream.server.traffic import Traffic

# QEMU counts zeroes that a guest writes as writes.
_KINDS = {
    "rd": (Command.READ,),
    "wr": (Command.WRITE, Command.WRITE_ZEROES),
    "unmap": (Command.TRIM,),
    "flush": (Command.FLUSH,),
}


class TrafficCommands:
    """query-blockstats of the disk ``device``."""

    def __init__(self, traffic: Traffic, device: str) -> None:
        self._traffic = traffic
        self._device = device

    @command("query-blockstats")
    async def query_blockstats(self) -> list[JSONObject]:
        """One entry. Times and what was merged are 0: we measure no times, and merge nothing."""
        traffic = self._traffic
        stats: JSONObject = {"account_invalid": True, "account_failed": True}
        stats |= {"wr_highest_offset": 0, "timed_stats": []}
        for kind, commands in _KINDS.items():
            for name, counts in (
                (f"{kind}_bytes", traffic.bytes),
                (f"{kind}_operations", traffic.done),
                (f"failed_{kind}_operations", traffic.failed),
                (f"invalid_{kind}_operations", traffic.refused),
            ):
                stats[name] = sum(counts[command] for command in commands)
            stats |= {f"{kind}_total_time_ns": 0, f"{kind}_merged": 0}
        for absent in ("flush_bytes", "flush_merged"):
            del stats[absent]
        return [{"device": self._device, "node-name": self._device, "stats": stats}]
