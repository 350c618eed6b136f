# SPDX-License-Identifier: Apache-2.0
"""One target without atheris: stored inputs, mutated at random. Takes libFuzzer's options."""

import json
import logging
import random
import sys
import time
from pathlib import Path

from fuzz.mutate import mutated
from fuzz.target import Checker, load


def main() -> None:
    name, *options = sys.argv[1:]
    logging.getLogger().setLevel(logging.CRITICAL)
    settings = dict(option[1:].split("=", 1) for option in options if option.startswith("-"))
    folders = [Path(option) for option in options if not option.startswith("-")]
    target = load(name)
    checker = Checker(target, tolerate_known=True)
    stored = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]
    chance = random.Random()
    runs = int(settings.get("runs", sys.maxsize))
    end = time.monotonic() + int(settings.get("max_total_time", sys.maxsize))
    data = b""
    try:
        while checker.executions < runs and time.monotonic() < end:
            number = checker.executions
            data = stored[number] if number < len(stored) else mutated(chance, stored)
            checker.check(data[: target.longest])
    except BaseException:
        path = Path(f"{settings['artifact_prefix']}crash-{hash(data) & 0xFFFFFFFF:08x}")
        path.write_bytes(data)
        print(f"Test unit written to {path}", file=sys.stderr)
        raise
    finally:
        summary = {"executions": checker.executions, "known": checker.known}
        print(json.dumps(summary), file=sys.stderr)


if __name__ == "__main__":
    main()
