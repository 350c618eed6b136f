# SPDX-License-Identifier: Apache-2.0
"""The window at work, as a picture: `./dev picture [FILE.svg]`.

One stream over an emulated link of 100 Mbit/s and 20 ms round trip. After a while a guest
makes 20 random reads a second; while it does, the link loses half of its rate and gets it
back. What is drawn is what the scheduler's trace and the reader saw, nothing is modelled.
`docs/window.svg` is made by this.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from benchmarks.chart import Band, Chart, Panel, Series
from benchmarks.report import progress
from nbdstream.backing.nbd import NbdBacking
from nbdstream.backing.scheduler import Sample
from nbdstream.disk import StreamedDisk
from nbdstream.service import ServeOptions, open_stream
from testbed.far import Far, far_backing, memory_directory
from testbed.link.model import Shape

SIZE = 2 << 30
LINK = Shape(rate=100e6, delay=0.010)
SLOWER = replace(LINK, rate=50e6)
END = 24.0
GUEST = (6.0, 20.0)
SLOW = (11.0, 15.0)
READS_PER_SECOND = 20
READ_SIZE = 4096
# Delivered bytes are counted over so many seconds for the rate.
RATE_STEP = 0.25


@dataclass
class Recording:
    """What was seen: the scheduler's samples, and when a guest's read began and what it took,
    in seconds since the beginning."""

    samples: list[Sample] = field(default_factory=list)
    reads: list[tuple[float, float]] = field(default_factory=list)


async def record() -> Recording:
    """Run the scenario in real time."""
    recording = Recording()
    with far_backing(LINK, "pattern", f"size={SIZE}") as far, memory_directory() as directory:
        options = ServeOptions(str(directory / "leaf.raw"), backing=far.uri, stream="paused")
        async with open_stream(options) as opened, trio.open_nursery() as nursery:
            assert isinstance(opened.disk.backing, NbdBacking) and opened.job is not None
            start = trio.current_time()

            def note(sample: Sample) -> None:
                recording.samples.append(sample._replace(time=sample.time - start))

            opened.disk.backing.scheduler.trace = note
            opened.job.resume()
            nursery.start_soon(_change_link, far, start)
            nursery.start_soon(_read, opened.disk, start, recording.reads)
            await trio.sleep_until(start + END)
            nursery.cancel_scope.cancel()
    return recording


async def _change_link(far: Far, start: float) -> None:
    for at, shape in zip(SLOW, (SLOWER, LINK), strict=True):
        await trio.sleep_until(start + at)
        await trio.to_thread.run_sync(far.link.set, shape)


async def _read(disk: StreamedDisk, start: float, reads: list[tuple[float, float]]) -> None:
    """A guest that misses at random times, in the half that the stream does not reach."""
    rng = random.Random(1)

    async def one() -> None:
        offset = rng.randrange(SIZE // 2, SIZE, READ_SIZE)
        began = trio.current_time()
        await disk.read(memoryview(bytearray(READ_SIZE)), offset)
        reads.append((began - start, trio.current_time() - began))

    await trio.sleep_until(start + GUEST[0])
    async with trio.open_nursery() as nursery:
        while trio.current_time() < start + GUEST[1]:
            nursery.start_soon(one)
            await trio.sleep(rng.expovariate(READS_PER_SECOND))


def draw(recording: Recording) -> str:
    """The recording as an SVG document."""
    samples = recording.samples
    assert LINK.rate is not None and SLOWER.rate is not None
    full, slow = LINK.rate / 1e6, SLOWER.rate / 1e6
    link = [(0.0, full), (SLOW[0], full), (SLOW[0], slow), (SLOW[1], slow), (SLOW[1], full)]
    rate = Panel(
        "delivered, Mbit/s",
        [
            Series("the link's rate", "limit", [*link, (END, full)]),
            Series("all that came over it", "first", _rates(samples)),
        ],
    )

    def curve(of: Callable[[Sample], float]) -> list[tuple[float, float]]:
        return [(sample.time, of(sample)) for sample in samples]

    window = Panel(
        "bytes, KiB",
        [
            Series("in flight", "second", curve(lambda sample: sample.in_flight / 1024)),
            Series("window", "first", curve(lambda sample: sample.window / 1024)),
        ],
    )
    reads = [(at, 1000 * took) for at, took in recording.reads]
    base = 2000 * LINK.delay
    latency = Panel(
        "a guest's read, ms",
        [
            Series("round trip without any load", "limit", [(0.0, base), (END, base)]),
            Series("4 KiB read that misses", "dots", reads),
        ],
    )
    chart = Chart(
        "Streaming over 100 Mbit/s and 20 ms, and a guest that misses 20 times a second",
        END,
        [rate, window, latency],
        [
            Band(*GUEST, "the guest reads"),
            Band(*SLOW, f"the link has {slow:g} Mbit/s"),
        ],
    )
    return chart.svg()


def _rates(samples: list[Sample]) -> list[tuple[float, float]]:
    """Mbit/s, in steps of RATE_STEP."""
    steps = [0.0] * (int(END / RATE_STEP) + 1)
    for sample in samples:
        steps[min(int(sample.time / RATE_STEP), len(steps) - 1)] += sample.length
    points = []
    for number, total in enumerate(steps[:-1]):
        points.append(((number + 0.5) * RATE_STEP, total * 8 / RATE_STEP / 1e6))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(prog="picture", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/window.svg"))
    arguments = parser.parse_args()
    progress(f"{END:g} seconds over the link ...")
    recording = trio.run(record)
    arguments.file.write_text(draw(recording))
    progress(f"{len(recording.samples)} reads of the backing, {len(recording.reads)} by the guest")
    print(arguments.file)


if __name__ == "__main__":
    main()
