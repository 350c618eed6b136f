# SPDX-License-Identifier: Apache-2.0
"""A guest beside a crowd of other clients: how long its reads take.

The guest reads 4 KiB of local data about a thousand times a second. The crowd opens and drops
connections, connects 500 at once, begins 100 slow handshakes, never reads its replies, sends
noise. The same crowd at another server beside it tells what the machine's cores cost, which
guest, servers and crowd share, from what the server does.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from benchmarks.report import Options, Report, judged, median, progress, ratio
from testbed import crowd
from testbed.peers import make_image, nbdstream_serve, temporary_directory

SIZE = 64 << 20
DEAF, SLOW, DROPPED, AT_ONCE, NOISE = 8, 100, 2000, 500, 100

Crowd = Callable[[Path], Awaitable[object]]


async def _all(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crowd.deaf, path, DEAF)
        nursery.start_soon(crowd.slow, path, SLOW)
        await crowd.drop(path, DROPPED)
        await crowd.together(path, AT_ONCE)
        await crowd.garbage(path, NOISE)
        nursery.cancel_scope.cancel()


CROWDS: dict[str, Crowd] = {
    f"{DROPPED} connections dropped": lambda path: crowd.drop(path, DROPPED),
    f"{AT_ONCE} at once": lambda path: crowd.together(path, AT_ONCE),
    f"{SLOW} slow handshakes": lambda path: crowd.slow(path, SLOW),
    f"{DEAF} that never read": lambda path: crowd.deaf(path, DEAF),
    f"{NOISE} that send noise": lambda path: crowd.garbage(path, NOISE),
    "all of these": _all,
}


def run(options: Options) -> Report:
    columns = ["crowd", "p99 ms, at another server", "p99 ms, at the guest's", "ratio", "p50 ratio"]
    report = Report("A guest's reads beside a crowd", columns)
    with temporary_directory() as directory:
        for name in ("own.raw", "other.raw"):
            make_image(directory / name, SIZE, sparse=False)
        with (
            nbdstream_serve(directory / "own.raw", None, "-f", "raw") as own,
            nbdstream_serve(directory / "other.raw", None, "-f", "raw") as other,
        ):
            report.add_peer(own, directory)
            for name, each in CROWDS.items():
                samples: dict[tuple[Path, int], list[float]] = {}
                for _ in range(options.rounds):
                    for crowded in (other.socket, own.socket):
                        progress(name, "own" if crowded == own.socket else "other")
                        found = trio.run(
                            crowd.guest_beside, own.socket, crowded, each, options.seconds
                        )
                        for percent in (50, 99):
                            value = 1000 * crowd.percentile(found, percent)
                            samples.setdefault((crowded, percent), []).append(value)
                other99, own99 = (median(samples[each, 99]) for each in (other.socket, own.socket))
                other50, own50 = (median(samples[each, 50]) for each in (other.socket, own.socket))
                report.rows.append(
                    [
                        name,
                        other99,
                        own99,
                        judged(ratio(own99, other99), most=3.0),
                        ratio(own50, other50),
                    ]
                )
    return report
