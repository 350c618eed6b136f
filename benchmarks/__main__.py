# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [NAME ...]`: run benchmarks and print one table each."""

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Options, Report, describe_machine, versions
from testbed.peers import MissingPeer, PeerError

# Each is a module with `run(options: Options) -> Report`.
NAMES = (
    "startup",
    "hotpath",
    "tls",
    "watched",
    "misses",
    "memory",
    "stream",
    "paths",
    "web",
    "contention",
    "writes",
    "boot",
    "migration",
    "pivot",
    "afterpivot",
    "crowd",
    "storm",
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="of each load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    return arguments


def _run(name: str, options: Options) -> Report:
    report: Report = importlib.import_module(f"benchmarks.{name}").run(options)
    report.machine, report.versions = describe_machine(), versions()
    return report


def main() -> None:
    arguments = _arguments()
    # As on an interrupt: peers are stopped and files removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="nbds-") as state:
        # Boot profiles that the user has would make a first boot a second one.
        os.environ["XDG_STATE_HOME"] = state
        failed = _run_all(arguments, Options(arguments.rounds, arguments.seconds))
    sys.exit(failed)


def _run_all(arguments: argparse.Namespace, options: Options) -> bool:
    """Run what was asked for, and print it. Returns whether something failed."""
    reports = {}
    failed = False
    for name in arguments.names or NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            report = _run(name, options)
        except MissingPeer as error:
            sys.exit(f"benchmarks: error: {error}")
        except PeerError as error:
            print(f"benchmarks: error: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        report.print()
        reports[name] = report.as_json()
        if arguments.json:
            # After each, so that an interrupted run keeps what it has.
            arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    main()
