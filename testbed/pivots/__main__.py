# SPDX-License-Identifier: Apache-2.0
"""Pivots of real guests with kills and failures at random steps; ends with what they lost.

python -m testbed.pivots [--pivots N] [--seed N]
"""

import argparse
import random
import time
from collections import Counter

import trio

from testbed import peers
from testbed.guests import images
from testbed.pivots.trial import Trial

SUFFIXES = ("qcow2", "raw", "qed")
# Beside other work, a server may take long to start. That is not what is tested here.
peers.READY_SECONDS = 120.0


def main() -> None:
    """Run as many pivots as asked for, and print each. Raises AssertionError for a loss."""
    parser = argparse.ArgumentParser(prog="python -m testbed.pivots", description=__doc__)
    parser.add_argument("--pivots", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    draw = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    done = acknowledged = guests = 0
    while done < options.pivots:
        suffix = SUFFIXES[guests % len(SUFFIXES)]
        trial = Trial(images.busybox(), suffix, draw)
        try:
            acknowledged += trio.run(trial.run)
        finally:
            for attempt in trial.attempts:
                print(f"{suffix:6} {attempt}", flush=True)
        done += len(trial.attempts)
        guests += 1
        outcomes.update(attempt.outcome for attempt in trial.attempts)
        said = f"{done} pivots of {guests} guests, {acknowledged} acknowledged writes, 0 lost"
        print(said, flush=True)
    print(dict(outcomes))


if __name__ == "__main__":
    main()
