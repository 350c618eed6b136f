# SPDX-License-Identifier: Apache-2.0
"""Inject one fault at each point of the scenario in turn.

    python -m testbed.faults [--format raw] [--seed 7] [--sample 200] [--seconds 60]
    python -m testbed.faults qcow2/7/pwrite/ENOSPC/12

Points run in an order drawn by the seed. Each that breaks a rule prints what is broken and
the command that repeats it. Exit status 1 if any did.
"""

import argparse
import logging
import random
import sys
import time

from testbed.faults.trial import ALL, Point, broken_rules, points

PROGRESS = 60.0  # seconds between two lines that say how far the run is


def main() -> int:
    """Run the points that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m testbed.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("point", nargs="*", help="run these points only")
    parser.add_argument("--format", choices=ALL, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    parser.add_argument("--sample", type=int, help="as many points of each format")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    arguments = parser.parse_args()
    logging.disable()  # the product says what has failed: here that is all of it
    seed = random.SystemRandom().randrange(1 << 16) if arguments.seed is None else arguments.seed
    if arguments.point:
        wanted = [Point.parse(text) for text in arguments.point]
    else:
        wanted = drawn(arguments.format or list(ALL), seed, arguments.sample)
    start, failed, done = time.monotonic(), 0, 0
    said = start
    for point in wanted:
        if time.monotonic() > said + PROGRESS:
            said = time.monotonic()
            print(f"{done} of {len(wanted)} points", file=sys.stderr, flush=True)
        if arguments.seconds and time.monotonic() - start > arguments.seconds:
            break
        done += 1
        broken = broken_rules(point)
        if broken:
            failed += 1
            print(f"python -m testbed.faults {point}", *broken[:4], sep="\n    ", flush=True)
    seconds = time.monotonic() - start
    print(f"{done} of {len(wanted)} points, seed {seed}, {failed} broken, {seconds:.0f} s")
    return 1 if failed else 0


def drawn(formats: list[str], seed: int, sample: int | None) -> list[Point]:
    """The points of these formats, in an order drawn by the seed; `sample` of each format."""
    order = random.Random(seed)
    chosen: list[Point] = []
    for name in formats:
        every = list(points(name, seed))
        order.shuffle(every)
        chosen += every[:sample]
    order.shuffle(chosen)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
