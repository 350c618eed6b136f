# SPDX-License-Identifier: Apache-2.0
"""`python -m testbed.paths [--seed N] [--count N]`: judge the controller on fresh paths."""

import argparse
import random
import sys
import time

from nbdstream.backing.window import Window
from testbed.paths.judge import find_oracle, judge
from testbed.paths.scenario import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="testbed.paths", description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="the first one")
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    failures = 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        rng = random.Random(seed)
        scenario = draw(rng.choice, seed)
        oracle = find_oracle(scenario)
        verdict, _ = judge(scenario, oracle, Window(rng=random.Random(seed)))
        if verdict.worst < 1:
            failures += 1
            print(f"seed {seed}: {verdict}\n  {scenario}")
            window = oracle.run.client.window
            print(
                f"  oracle: {window.size} in units of {window.unit}, {oracle.rate / 1e6:.1f} MB/s"
            )
    print(f"{arguments.count - failures} of {arguments.count} good, from seed {arguments.seed}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
