# SPDX-License-Identifier: Apache-2.0
"""Findings that are not fixed yet: named and counted, so that fuzzing can go on behind them.

Each has an input in ``regressions/TARGET/``, which has to meet it for as long as it is listed:
a fix that leaves its entry here fails the tests.
"""

import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A finding: ``error`` got out of ``function`` (anywhere on the stack) of ``target``.

    ``inputs`` are the names of its files in ``regressions/TARGET/``.
    """

    target: str
    error: str
    function: str
    inputs: tuple[str, ...]
    what: str


KNOWN: tuple[Known, ...] = ()


def known_finding(target: str, error: Exception) -> str:
    """What is known of this error, or ""."""
    for known in KNOWN:
        if known.target == target and type(error).__name__ == known.error:
            names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            if known.function in names:
                return known.what
    return ""


def is_known_input(target: str, name: str) -> bool:
    """Whether this file of the regressions is one that still breaks a rule."""
    return any(known.target == target and name in known.inputs for known in KNOWN)
