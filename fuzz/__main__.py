# SPDX-License-Identifier: Apache-2.0
"""Run targets, one after the other; each in a process of its own.

    python -m fuzz [TARGET ...] [--time SECONDS | --runs NUMBER] [--save] [--log FILE]

Coverage-guided with atheris where it is installed, else with mutated seeds. What is new to the
corpus stays in build/fuzz/TARGET; ``--save`` minimises it into the repository's corpus. An
input that breaks a rule is written to build/fuzz/findings, and the exit status is 1.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.files import GIVEN, make_directory
from fuzz.minimise import minimal
from fuzz.target import HERE, NAMES, Target, load

BUILD = HERE.parent / "build" / "fuzz"
FINDINGS = BUILD / "findings"
DEFAULT_SECONDS = 30
# Of an input in the repository's corpus, and of all inputs of one target.
SAVED_INPUT = 2048
SAVED_TARGET = 24 << 10


@dataclass
class Outcome:
    """What a run of one target came to."""

    target: str
    executions: int = 0
    seconds: float = 0.0
    known: dict[str, int] = field(default_factory=dict)
    finding: str = ""


def main() -> int:
    arguments = _arguments()
    logging.getLogger().setLevel(logging.CRITICAL)
    outcomes = []
    for name in arguments.targets or NAMES:
        target = load(name)
        corpus = _working_corpus(target)
        outcome = _run(target, corpus, arguments.runs, arguments.time)
        outcomes.append(outcome)
        _print(outcome)
        if arguments.log:
            with arguments.log.open("a") as log:
                log.write(json.dumps(vars(outcome)) + "\n")
        if arguments.save:
            _save(target, corpus)
    return any(outcome.finding for outcome in outcomes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--time", type=int, metavar="SECONDS", help="for each target (30)")
    length.add_argument("--runs", type=int, metavar="NUMBER", help="executions of each target")
    parser.add_argument("--save", action="store_true", help="add to the repository's corpus")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append a line of JSON per run")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(NAMES):
        parser.error(f"no such target: {min(unknown)}; there are {', '.join(NAMES)}")
    if arguments.time is None and arguments.runs is None:
        arguments.time = DEFAULT_SECONDS
    return arguments


def _working_corpus(target: Target) -> Path:
    """Where a run begins: the seeds, the repository's inputs, what earlier runs found."""
    folder = BUILD / target.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    for path in target.stored():
        if path.stat().st_size <= target.longest:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _run(target: Target, corpus: Path, runs: int | None, seconds: int | None) -> Outcome:
    FINDINGS.mkdir(parents=True, exist_ok=True)
    guided = importlib.util.find_spec("atheris") is not None
    module = "fuzz.guided" if guided else "fuzz.unguided"
    command = [sys.executable, "-m", module, target.name]
    command += [f"-runs={runs}"] if runs is not None else [f"-max_total_time={seconds}"]
    command += [f"-artifact_prefix={FINDINGS}/{target.name}-", str(corpus)]
    made = make_directory()
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), GIVEN: made},
    )
    shutil.rmtree(made)
    outcome = Outcome(target.name, seconds=round(time.monotonic() - began, 1))
    for line in done.stdout.splitlines():
        if match := re.match(r"Done (\d+) runs|#(\d+)\t", line):
            outcome.executions = max(outcome.executions, int(match[1] or match[2]))
        elif line.startswith('{"executions"'):
            summary = json.loads(line)
            outcome.executions, outcome.known = summary["executions"], summary["known"]
    if done.returncode:
        outcome.finding = done.stdout[-4000:]
    return outcome


def _print(outcome: Outcome) -> None:
    rate = outcome.executions / max(outcome.seconds, 0.1)
    print(
        f"{outcome.target:14} {outcome.executions:>10} executions {outcome.seconds:>8.1f} s "
        f"{rate:>8.0f}/s  {'FINDING' if outcome.finding else 'ok'}",
        flush=True,
    )
    for name, count in outcome.known.items():
        print(f"{'':14} {count:>10} times the known finding: {name}")
    if outcome.finding:
        print(outcome.finding, flush=True)


def _save(target: Target, corpus: Path) -> None:
    """Keep, of a working corpus, the shortest inputs that together reach everything."""
    inputs = [path.read_bytes() for path in corpus.iterdir()]
    kept = minimal(target, inputs, most=SAVED_TARGET, longest=SAVED_INPUT)
    target.corpus.mkdir(parents=True, exist_ok=True)
    for path in target.corpus.iterdir():
        path.unlink()
    for data in kept:
        (target.corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
