# SPDX-License-Identifier: Apache-2.0
"""One target under atheris (libFuzzer): a process that ends with the run.

    python -m fuzz.guided TARGET LIBFUZZER-OPTION...

The last line on stderr is a JSON object: executions, known findings by name.
"""

import json
import logging
import os
import sys

import atheris

from fuzz.target import Checker, load


def main() -> None:
    name, *options = sys.argv[1:]
    logging.getLogger().setLevel(logging.CRITICAL)
    with atheris.instrument_imports(include=["nbdstream"]):
        target = load(name)
    checker = Checker(target, tolerate_known=True)

    def report() -> None:
        summary = {"executions": checker.executions, "known": checker.known}
        os.write(2, b"\n" + json.dumps(summary).encode() + b"\n")

    def one(data: bytes) -> None:
        try:
            checker.check(data)
        except BaseException:
            report()
            raise

    limits = [f"-max_len={target.longest}", f"-timeout={int(10 + 10 * target.seconds)}"]
    limits += ["-rss_limit_mb=2048", "-print_funcs=0"]
    atheris.Setup([sys.argv[0], *limits, *options], one)
    # libFuzzer ends the process by itself, without Python's own end.
    atheris.Fuzz()


if __name__ == "__main__":
    main()
