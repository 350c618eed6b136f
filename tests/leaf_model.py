# SPDX-License-Identifier: Apache-2.0
"""A leaf against a byte array, through flushes, failures and reopenings: a state machine.

A test module says of which kind of image: ``TestRawModel = model_test(ours("raw"))``.
"""

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdstream.extents import align_down, align_up
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    BackingReference,
    FlushNeeded,
    State,
)
from testbed.leaves import abandon, drive, flush
from tests.leaf_support import (
    ImageKind,
    check_locate,
    extents,
    full_disk,
    guest_write,
    pattern,
    qemu_check,
    read,
)


class LeafMachine(RuleBasedStateMachine):
    """A leaf against a byte array, through flushes, failures and reopens.

    A flush may be under way: then its snapshot is taken, and its blocking part runs at
    some later step, with changes in between.
    """

    kind: ImageKind
    size = (1 << 20) + 1536
    # Where things happen: at both ends, and around the middle.
    places = st.one_of(
        st.integers(0, 160 * 1024),
        st.integers((1 << 19) - 5000, (1 << 19) + 5000),
        st.integers((1 << 20) - 66000, (1 << 20) + 1535),
    )

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "disk"
        self.backing = pattern(0, self.size)
        self.version = 0
        self.flushing: Any = None

    @initialize()
    def create(self) -> None:
        self.leaf = self.kind.new(self.path, self.size)
        self.unit = self.leaf.block_size
        self.visible = bytearray(self.backing)
        self.allocated = [False] * -(-self.size // self.unit)

    def _data(self, length: int) -> bytes:
        self.version += 1
        return (b"%d." % self.version * (length // 2 + 1))[:length]

    def _call(self, call: Any) -> None:
        """Like `drive`, but a flush that is under way ends before another one begins."""
        try:
            call()
        except FlushNeeded:
            if self.flushing is not None:
                self.end_flush(ok=True)
            drive(self.leaf, call)
        except Exception:
            drive(self.leaf, call)

    def _mark(self, start: int, end: int) -> None:
        for block in range(start // self.unit, -(-end // self.unit)):
            self.allocated[block] = True

    @rule(offset=places, length=st.integers(1, 150_000))
    def write_anything(self, offset: int, length: int) -> None:
        """As a guest does: the blocks at the edges are filled in first."""
        if self.flushing is not None:
            self.end_flush(ok=True)
        data = self._data(min(length, self.size - offset))
        guest_write(self.leaf, offset, data, self.backing)
        self.visible[offset : offset + len(data)] = data
        self._mark(offset, offset + len(data))
        # A compressed cluster would have been expanded as a whole.
        for extent in extents(self.leaf):
            if extent.state is not State.UNALLOCATED:
                self._mark(extent.offset, extent.end)

    @rule(offset=places, blocks=st.integers(1, 20))
    def write_blocks(self, offset: int, blocks: int) -> None:
        start = align_down(offset, self.unit)
        end = min(start + blocks * self.unit, self.size)
        data = self._data(end - start)
        self._call(lambda: self.leaf.write(start, memoryview(data)))
        self.visible[start:end] = data
        self._mark(start, end)

    @rule(offset=places, blocks=st.integers(1, 20), unmap=st.booleans())
    def zero_blocks(self, offset: int, blocks: int, unmap: bool) -> None:
        start = align_down(offset, self.unit)
        end = min(start + blocks * self.unit, self.size)
        self._call(lambda: self.leaf.zero(start, end - start, unmap=unmap))
        self.visible[start:end] = bytes(end - start)
        self._mark(start, end)

    @precondition(lambda self: self.flushing is None)
    @rule()
    def begin_flush(self) -> None:
        self.flushing = self.leaf.begin_flush()

    @precondition(lambda self: self.flushing is not None)
    @rule(ok=st.booleans())
    def end_flush(self, ok: bool) -> None:
        """With ``ok`` False there is no room for metadata, if there is any to write."""
        rest, self.flushing = self.flushing, None
        try:
            with nullcontext() if ok else full_disk():
                rest()
        except OSError:
            assert not ok
        else:
            ok = True
        self.leaf.end_flush(ok=ok)

    @precondition(lambda self: self.flushing is None)
    @rule()
    def reopen(self) -> None:
        self.leaf.close()
        qemu_check(self.path, self.kind.format)
        self.leaf = self.kind.open(self.path)
        assert not self.leaf.dirty

    @rule(written=st.booleans())
    def kill(self, written: bool) -> None:
        """The process is killed, perhaps in a flush, which perhaps has reached the file. Nothing
        is lost."""
        if self.flushing is not None and written:
            self.flushing()
        self.flushing = None
        abandon(self.leaf)
        self.leaf = self.kind.open(self.path)

    @precondition(lambda self: self.flushing is None)
    @rule(number=st.integers(0, 9))
    def record_backing(self, number: int) -> None:
        flush(self.leaf)
        self.leaf.record_backing(BackingReference(f"nbd://host/{number}", "raw", self.size, "id"))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "leaf"):
            return
        assert read(self.leaf, 0, self.size, self.backing) == self.visible
        for extent in extents(self.leaf):
            first, stop = extent.offset // self.unit, align_up(extent.end, self.unit) // self.unit
            local = extent.state is not State.UNALLOCATED
            assert set(self.allocated[first:stop]) == {local}, extent

    @rule(offset=places, length=st.integers(1, 300_000))
    def locate(self, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        check_locate(self.leaf, offset, length, self.backing)
        host = self.leaf.locate(offset, length)
        drive(self.leaf, lambda: list(self.leaf.extents(offset, length)))
        # Asked again with all metadata in memory, one block is never a mystery.
        one = min(self.unit - offset % self.unit, length)
        if extents(self.leaf, offset, one)[0].state is State.DATA:
            assert self.leaf.locate(offset, one) >= 0
        assert host in (ALL_ZERO, SCATTERED) or host >= 0

    def teardown(self) -> None:
        try:
            if self.flushing is not None:
                self.end_flush(ok=True)
            if hasattr(self, "leaf"):
                self.leaf.close()
                qemu_check(self.path, self.kind.format)
        finally:
            shutil.rmtree(self.directory)


def model_test(kind: ImageKind, *, examples: int = 40, steps: int = 25) -> Any:
    """The test case that runs `LeafMachine` over a kind of image."""
    machine: Any = type(f"Machine_{kind.name}", (LeafMachine,), {"kind": kind})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case
