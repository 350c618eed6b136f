# SPDX-License-Identifier: Apache-2.0
"""Load on an NBD export: fio with its nbd engine, and what it says of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from testbed.peers import binary, run

# fio may take this much longer than it was told to: a slow server answers late.
SLACK_SECONDS = 60
# Options of `nbdstream serve` where misses are measured: the profile that one round leaves
# behind would have the next one fetch ahead of its reads.
NO_PROFILE = ("--prefetch", "off")


@dataclass(frozen=True)
class Result:
    """What a load reached: operations and bytes per second; completion latencies in ms."""

    operations: int
    iops: float
    rate: float
    mean: float
    p50: float
    p99: float


def fio_command(uri: str, rw: str, block: str, depth: int, *options: str) -> list[str]:
    command = [binary("FIO"), "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}"]
    return [*command, f"--bs={block}", f"--iodepth={depth}", "--output-format=json", *options]


def fio(uri: str, rw: str, block: str, depth: int, seconds: float, *options: str) -> Result:
    """Put a load on `uri` for `seconds`; `rw` as fio says it (`randread`, `write`, ...)."""
    # In whole units: fio takes "0.5" for 0, which means for ever.
    timed = ("--time_based", f"--runtime={round(seconds * 1000)}ms")
    return run_fio(fio_command(uri, rw, block, depth, *timed, *options), seconds)


def run_fio(command: Sequence[str], seconds: float) -> Result:
    """Run fio for about `seconds` and add up its reads and writes."""
    output = run(command, timeout=seconds + SLACK_SECONDS)
    # Remarks come before the JSON.
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return _result([job["read"], job["write"]])


def _result(sides: list[dict[str, Any]]) -> Result:
    used = [side for side in sides if side["total_ios"]]
    if not used:
        return Result(0, 0.0, 0.0, float("nan"), float("nan"), float("nan"))
    # Only one-sided loads are asked for their latency; of a mix it is the worse side's.
    worst = max(used, key=lambda side: float(side["clat_ns"]["mean"]))
    latency = worst["clat_ns"]
    percentiles = latency.get("percentile", {})
    return Result(
        operations=sum(side["total_ios"] for side in used),
        iops=sum(side["iops"] for side in used),
        rate=sum(side["bw_bytes"] for side in used),
        mean=latency["mean"] / 1e6,
        p50=percentiles.get("50.000000", float("nan")) / 1e6,
        p99=percentiles.get("99.000000", float("nan")) / 1e6,
    )
