# SPDX-License-Identifier: Apache-2.0
"""The process that has a leaf open is killed, before and in the middle of each of its calls to
the system: what it has acknowledged is there when the leaf is opened again, flushed or not."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from nbdstream.extents import align_up
from nbdstream.leaf import files
from nbdstream.leaf.redo import RedoLog
from testbed.leaves import flush
from tests.leaf_life import backing_of
from tests.leaf_powercut import restore
from tests.leaf_support import (
    SECTOR,
    ImageKind,
    by_qemu,
    ours,
    pattern,
    qemu_check,
    read,
    write,
    zero,
)

SIZE = (4 << 20) + SECTOR
# Both ends of the disk, which are in different tables of the small kinds.
PLACES = ((0, 12 * 4096), ((4 << 20) - 4 * 4096, 4 * 4096 + SECTOR))
STEPS = 16
SCRIPTS = 2
KINDS = [
    ours("raw"),
    ours("qed", 4096),
    by_qemu("qed", "cluster_size=4096,table_size=2"),
    ours("qcow2"),
    by_qemu("qcow2", "cluster_size=512,refcount_bits=1"),
    by_qemu("qcow2", "cluster_size=4096,compat=0.10"),
]
KILLED = 77  # the exit status of a process that was killed
_pwrite = os.pwrite
CALLS: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("pwrite", "ftruncate", "fdatasync", "fsync", "unlink")),
    (files, "fallocate"),
    (RedoLog, "append"),
    (RedoLog, "end_flush"),
)


class Step(NamedTuple):
    """What is done to a leaf; a change has an offset and what is there afterwards."""

    kind: str
    offset: int = 0
    data: bytes = b""


def script(block_size: int, seed: int) -> list[Step]:
    """Changes, flushes and clean reopens, drawn at random."""
    rng = random.Random(seed)
    steps = []
    for version in range(1, STEPS + 1):
        kind = rng.choices(("write", "zero", "unmap", "flush", "reopen"), (50, 15, 15, 12, 8))[0]
        first, length = rng.choice(PLACES)
        offset = rng.randrange(align_up(length, block_size) // block_size) * block_size
        size = min(rng.randint(1, 4) * block_size, length - offset)
        data = pattern(first + offset, size, version) if kind == "write" else bytes(size)
        steps.append(Step(kind, first + offset, data))
    return steps


def live(kind: ImageKind, path: Path, steps: list[Step], tell: Callable[[], object]) -> None:
    """Do all that to a leaf, and ``tell`` after each step."""
    leaf = kind.open(path)
    for step in steps:
        if step.kind == "write":
            write(leaf, step.offset, step.data)
        elif step.kind == "flush":
            flush(leaf)
        elif step.kind == "reopen":
            leaf.close()
            leaf = kind.open(path)
        else:
            zero(leaf, step.offset, len(step.data), unmap=step.kind == "unmap")
        tell()
    leaf.close()


@dataclass
class Kill:
    """Ends this process at a call that changes what outlives it, after ``left`` others: before
    the call, or half-way through a write."""

    left: int
    half: bool = False

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        with contextlib.ExitStack() as patches:
            for owner, name in CALLS:
                call = self._wrapped(getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, call))
            yield

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                if self.half and real is _pwrite:
                    fd, data, offset = arguments
                    real(fd, data[: len(data) // 2 // 4096 * 4096], offset)
                os._exit(KILLED)
            return real(*arguments, **named)

        return call


def in_a_process(work: Callable[[Callable[[], object]], None]) -> tuple[int, bool]:
    """Have another process do what may end it. Returns how often it told, and whether it was
    killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(lambda: os.write(writing, b"."))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = len(pipe.read())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return told, status == KILLED


def killed_life(
    kind: ImageKind,
    path: Path,
    steps: list[Step],
    killer: Kill,
    tell: Callable[[], object],
) -> None:
    with killer.armed():
        live(kind, path, steps, tell)


def killed_recovery(kind: ImageKind, path: Path, killer: Kill, _tell: object) -> None:
    with killer.armed():
        kind.open(path)
        os._exit(KILLED)


def judge(kind: ImageKind, path: Path, steps: list[Step], acknowledged: int) -> None:
    """All acknowledged steps are there; of the next one, each sector may be there or not."""
    backing = backing_of(SIZE)
    before, after = (
        {first: bytearray(backing[first : first + length]) for first, length in PLACES}
        for _ in range(2)
    )
    for number, step in enumerate(steps[: acknowledged + 1]):
        if step.kind in ("write", "zero", "unmap"):
            place = max(first for first, _ in PLACES if first <= step.offset)
            here = slice(step.offset - place, step.offset - place + len(step.data))
            after[place][here] = step.data
            if number < acknowledged:
                before[place][here] = step.data
    leaf = kind.open(path)
    try:
        for offset, length in PLACES:
            found = read(leaf, offset, length, backing)
            for at in range(0, length, SECTOR):
                here = slice(at, at + SECTOR)
                sector = found[here]
                assert sector in (before[offset][here], after[offset][here]), (
                    f"offset {offset + at} after {steps[:acknowledged]} {sector[:16].hex()}"
                )
        result = leaf.check(repair=False)
        assert (result.errors, result.leaks if kind.format != "raw" else 0) == (0, 0), result
    finally:
        leaf.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_killed_process_loses_nothing(kind: ImageKind, tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    scripts = [script(leaf.block_size, seed) for seed in range(SCRIPTS)]
    leaf.close()
    fresh = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for number in range(100_000):
        restore(tmp_path, fresh)
        steps = scripts[number % SCRIPTS]
        kill = Kill(number // SCRIPTS, half=number % 3 == 1)
        acknowledged, killed = in_a_process(partial(killed_life, kind, path, steps, kill))
        if number % 4 < 2:
            in_a_process(partial(killed_recovery, kind, path, Kill(rng.randrange(12))))
        judge(kind, path, steps, acknowledged)
        if number % 50 == 0:
            qemu_check(path, kind.format)
        if not killed and number % SCRIPTS == SCRIPTS - 1:
            break
    assert number > SCRIPTS * 2 * STEPS
