# SPDX-License-Identifier: Apache-2.0
"""Run the peers' suites with both servers, and compare: see `testbed.suites`.

    python -m testbed.suites [--directory DIR] [TEST ...]

Prints a row for each test that runs here and starts our server. Exit status 1 if one fails with our
server alone, or otherwise than with qemu-nbd, for no reason that is listed here. The tests' output
is kept in DIR/run.
"""

import argparse
import sys
from pathlib import Path

from testbed.suites.iotests import Iotests
from testbed.suites.libnbd import Libnbd
from testbed.suites.result import HEAD, SKIP, Comparison, program
from testbed.suites.sources import source

# Tests hold words and choices of qemu-nbd, too. Where ours are others on purpose:
_CHUNKS = "a read that is a hole in part is answered with one chunk of data"
_ALIGNMENT = "reads and writes of any alignment are served, whether or not a format is named"
_SIZE = "the size of the file is the export's to the byte; qemu-nbd's is a multiple of 512"
_DEPTH = "allocation depth has two values: local, and all images below"
_WORDS = "our messages have other words, and there are warnings where qemu-nbd has none"
_MORE = "contexts, flags and block size of our own"
REASONS = {
    "interop/structured-read.sh": _CHUNKS,
    "interop/interop-qemu-block-size.sh": _ALIGNMENT,
    "info/info-map-qemu-allocation-depth.sh": _DEPTH,
    "raw nbd 241": _SIZE,
    "raw file 233": _WORDS,
    "qcow2 file 233": _WORDS,
    "qcow2 file 264": _WORDS,
    "qcow2 file tests/nbd-qemu-allocation": _MORE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("build/suites"))
    parser.add_argument("tests", nargs="*", help="run these tests only")
    options = parser.parse_args()
    directory = options.directory.resolve()
    sources, work = directory / "sources", directory / "run"
    theirs, ours = (program(server, work) for server in ("qemu-nbd", "nbdstream"))
    faults, ran, skipped, without, started = [], 0, 0, 0, 0
    print(HEAD)
    for suite in Libnbd(source("libnbd", sources), work), Iotests(source("qemu", sources), work):
        for name in suite.names():
            if options.tests and not {name, name.split()[-1]} & set(options.tests):
                continue
            outcome = suite.run(name, theirs)
            if outcome.result == SKIP:
                # One that is known to start our server has to run.
                faults += [name] if name in REASONS else []
                skipped += 1
                continue
            found = Comparison(name, outcome, suite.run(name, ours), REASONS.get(name, ""))
            if found.ours.ours == 0:
                without += 1
                continue
            print(found.line(), flush=True)
            ran, started = ran + 1, started + found.ours.ours
            faults += [name] if found.is_fault else []
    print(
        f"\n{ran} tests with {started} starts of our server; {without} more start none, "
        f"and {skipped} do not run here; "
        f"unexplained: {', '.join(faults) or 'none'}"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
