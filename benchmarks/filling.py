# SPDX-License-Identifier: Apache-2.0
"""A leaf becomes local, as a picture: `./dev picture map [FILE.svg]`.

A leaf of an image with holes, over an emulated link of 100 Mbit/s and 20 ms round trip. A guest
reads here and there while the rest streams. Nothing is modelled: what is drawn are the leaf's
maps at three moments. `docs/map.svg` is made by this.
"""

import argparse
import random
from pathlib import Path

import trio

from benchmarks.report import progress
from nbdstream.cli.picture import cells, legend, opening, weigh_extents
from nbdstream.disk import StreamedDisk
from nbdstream.leaf.map import walk
from nbdstream.service import ServeOptions, open_stream
from testbed.far import far_backing, memory_directory
from testbed.link.model import Shape
from testbed.peers import make_image

MIB = 1 << 20
SIZE = 256 * MIB
LINK = Shape(rate=100e6, delay=0.010)
COLUMNS, ROWS = 128, 12
GUEST_SECONDS = 1.0
MARGIN, STRIP = 16, 140


async def record() -> list[str]:
    """Run the scenario in real time; the parts of the picture."""
    parts: list[str] = []
    with memory_directory() as directory:
        make_image(directory / "image", SIZE)
        with far_backing(LINK, "file", str(directory / "image")) as far:
            options = ServeOptions(str(directory / "leaf.qcow2"), backing=far.uri, stream="paused")
            async with open_stream(options) as opened:
                disk, job = opened.disk, opened.job
                assert job is not None
                start = trio.current_time()
                with trio.move_on_after(GUEST_SECONDS):
                    await _read(disk)
                parts += _strip(disk, 0, f"after {GUEST_SECONDS:g} s: what the guest has read")
                whole = job.remaining
                job.resume()
                while job.remaining > whole / 2:  # noqa: ASYNC110 - a matter of seconds
                    await trio.sleep(0.05)
                seconds = trio.current_time() - start
                parts += _strip(disk, 1, f"after {seconds:.0f} s: the stream is half done")
                await job.completed.wait()
                seconds = trio.current_time() - start
                parts += _strip(disk, 2, f"after {seconds:.0f} s: all is local")
    return parts


async def _read(disk: StreamedDisk) -> None:
    """A guest that boots: short stretches of reads, all over the disk."""
    rng = random.Random(1)
    while True:
        start = rng.randrange(0, SIZE - MIB, 4096)
        for offset in range(start, start + MIB // 4, 65536):
            view = memoryview(bytearray(65536))
            if disk.read_nowait(view, offset).name == "MISS":
                await disk.read(view, offset)


def _strip(disk: StreamedDisk, number: int, title: str) -> list[str]:
    weights = weigh_extents(walk(disk.leaf), SIZE, COLUMNS * ROWS)
    top = MARGIN + number * STRIP
    return [
        f'<text x="{MARGIN}" y="{top + 11}" font-weight="bold">{title}</text>',
        *legend(weights, SIZE, MARGIN + 340, top),
        *cells(weights, COLUMNS, MARGIN, top + 20),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="picture map", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/map.svg"))
    arguments = parser.parse_args()
    progress("streaming over the link ...")
    parts = trio.run(record)
    document = [*opening(7 * COLUMNS + 2 * MARGIN, 3 * STRIP + MARGIN), *parts, "</svg>\n"]
    arguments.file.write_text("\n".join(document))
    print(arguments.file)


if __name__ == "__main__":
    main()
