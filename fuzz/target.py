# SPDX-License-Identifier: Apache-2.0
"""What a target is, and the rules that every input has to keep.

The rule of each target is one line: accept the input, or raise one of the errors that the
target names (``refusals``), and nothing else. On top of that, for every input:

- **no hang**: an input that takes more CPU time than ``seconds`` is a finding. (A wait
  without CPU time is caught from outside: libFuzzer's ``-timeout``, pytest's timeout.)

and for every `SAMPLE`-th input, because these checks cost more than most inputs do:

- **no growth**: the peak of the memory that Python allocated stays below ``memory``;
- **no leak**: as many file descriptors are open afterwards as before;
- **deterministic**: the same input again has the same outcome.
"""

import importlib
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz.known import known_finding

HERE = Path(__file__).parent
SAMPLE = 512

NAMES = (
    "handshake",
    "transmission",
    "replies",
    "qmp_server",
    "qmp_client",
    "profile",
    "seal",
    "units",
    "addresses",
    "sources",
    "metrics",
    "systemd",
    "qcow2",
    "qed",
    "raw",
    "disk",
    "backing",
)


class Finding(Exception):  # noqa: N818 - the word of the trade
    """A rule was broken, other than by an exception that got out."""


class Hang(BaseException):
    """Too much CPU time. Not an Exception, so that no ``except Exception`` hides it."""


@dataclass(frozen=True)
class Target:
    """Code that reads bytes from outside, and what it may do with them.

    Attributes:
        name: of the module and of the corpus' folder.
        run: gives one input to the code; returns what came of it, for comparison.
        refusals: the errors with which the code may refuse an input.
        seeds: valid inputs to begin with.
        seconds: CPU time that one input may take.
        memory: bytes that Python may allocate for one input.
        longest: bytes of an input.
        examples: how many fresh inputs the tests try.
        deterministic: the same input has the same outcome.
    """

    name: str
    run: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    seconds: float = 2.0
    memory: int = 8 << 20
    longest: int = 4096
    examples: int = 200
    deterministic: bool = True

    @property
    def corpus(self) -> Path:
        """Inputs that reach something new each."""
        return HERE / "corpus" / self.name

    @property
    def regressions(self) -> Path:
        """Inputs that once broke a rule."""
        return HERE / "regressions" / self.name

    def stored(self) -> list[Path]:
        """All inputs of the repository."""
        folders = (self.corpus, self.regressions)
        return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir())


def load(name: str) -> Target:
    """The target of that name."""
    target: Target = importlib.import_module(f"fuzz.targets.{name}").TARGET
    assert target.name == name
    return target


class Checker:
    """Gives inputs to a target and holds it to the rules.

    ``known`` counts inputs that met a finding of `fuzz.known`; without ``tolerate_known``
    these are raised like any other.
    """

    def __init__(self, target: Target, *, tolerate_known: bool = False) -> None:
        self._target = target
        self._tolerate_known = tolerate_known
        self.executions = 0
        self.known: dict[str, int] = {}
        signal.signal(signal.SIGVTALRM, _stop_hang)

    def check(self, data: bytes, *, thorough: bool | None = None) -> None:
        """Try one input. Raises what got out of the target, `Finding` or `Hang`.

        ``thorough``: with the checks of the sample; None leaves that to chance.
        """
        if thorough is None:
            thorough = self.executions % SAMPLE == 0
        self.executions += 1
        try:
            self._check(data, thorough=thorough)
        except Exception as error:
            name = known_finding(self._target.name, error) if self._tolerate_known else ""
            if not name:
                raise
            self.known[name] = self.known.get(name, 0) + 1

    def _check(self, data: bytes, *, thorough: bool) -> None:
        if not thorough:
            self._outcome(data)
            return
        # The first run fills caches, which are not growth.
        first = self._outcome(data)
        descriptors = _open_descriptors()
        tracemalloc.start()
        try:
            second = self._outcome(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if peak > self._target.memory:
            raise Finding(f"growth: {peak} bytes for an input of {len(data)}")
        if _open_descriptors() != descriptors:
            raise Finding(f"leak: {_open_descriptors()} descriptors, {descriptors} before")
        if self._target.deterministic and first != second:
            raise Finding(f"not deterministic: {first!r:.500}, then {second!r:.500}")

    def _outcome(self, data: bytes) -> object:
        signal.setitimer(signal.ITIMER_VIRTUAL, self._target.seconds)
        try:
            return self._target.run(data)
        except self._target.refusals as error:
            return type(error), str(error)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _stop_hang(_number: int, _frame: FrameType | None) -> None:
    raise Hang("the input took too much CPU time")


def _open_descriptors() -> int:
    return sum(1 for _ in os.scandir("/proc/self/fd"))
