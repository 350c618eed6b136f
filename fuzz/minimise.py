# SPDX-License-Identifier: Apache-2.0
"""A small corpus of a large one: the shortest inputs that together reach everything.

What an input reaches is measured as arcs (from line to line of the code under test) and how
often each is taken, in powers of two, as libFuzzer counts.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import nbdstream
from fuzz.target import Checker, Target

_PRODUCT = str(Path(nbdstream.__file__).parent)

Arc = tuple[str, int, int]


def reached(target: Target, data: bytes) -> set[tuple[Arc, int]]:
    """The arcs that an input takes. Raises what the target raises."""
    arcs: Counter[Arc] = Counter()

    def enter(frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(_PRODUCT):
            return None
        last = 0

        def step(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal last
            if event == "line":
                arcs[name, last, frame.f_lineno] += 1
                last = frame.f_lineno
            return step

        return step

    checker = Checker(target, tolerate_known=True)
    sys.settrace(enter)
    try:
        checker.check(data, thorough=False)
    finally:
        sys.settrace(None)
    return {(arc, count.bit_length()) for arc, count in arcs.items()}


def minimal(target: Target, inputs: Iterable[bytes], *, most: int, longest: int) -> list[bytes]:
    """The inputs to keep: none longer than ``longest`` bytes, all of them within ``most``."""
    seen: set[tuple[Arc, int]] = set()
    kept = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        if len(data) > min(longest, most):
            break
        new = reached(target, data) - seen
        if new:
            seen |= new
            kept.append(data)
            most -= len(data)
    return kept
