# SPDX-License-Identifier: Apache-2.0
"""One point: where it is, the life that has it, and whether the rules held afterwards.

A point is written FORMAT/SEED/KIND/FAULT/NUMBER: the call KIND fails with FAULT at its call
NUMBER, or, with the fault `cancel`, KIND (a client, the job, the service) is cancelled at its
step NUMBER. The rules:

- no acknowledged and flushed change is lost, and after a clean stop without a failed sync no
  acknowledged one; nothing else than the guests' and the backing's bytes is ever seen;
- a fault fails the few requests that meet it; every guest is served to the end;
- nothing but an error that says so leaves the disk, the job or the leaf;
- the image opens again, and our check and `qemu-img check` find it clean.

What has the life, and the faults, is told by the word before the format:

- none: the disk alone, on the virtual clock (`scenario`);
- far: the same, over a backing's server that fails (`far`);
- served: a whole server (`served`);
- cancelled: the same; the server, its job or a client's connection is ended at one of the steps
  of its tasks (`disturber`);
- helper: the same; the process that reads the backing is killed (`helper`).
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference, ColdMetadata, Leaf, State
from testbed.faults.disturber import VICTIMS, Disturber
from testbed.faults.far import FAR_FAULTS, failing_once
from testbed.faults.helper import HELPER_FAULTS
from testbed.faults.oracle import CELL
from testbed.faults.scenario import CELLS, CONTENT, FAILED_MOST, SIZE, Canceller, Life
from testbed.faults.served import Served
from testbed.faults.shim import FAULTS, SERVER_FAULTS, SYNCS, Shim
from testbed.peers import PeerError, run

MEMORY = Path("/dev/shm")
CANCEL = "cancel"
FORMATS = {
    "raw": ("raw", True),
    "qcow2": ("qcow2", True),
    "qcow2-plain": ("qcow2", False),
    "qed": ("qed", True),
}


def _kind_of_life(word: str) -> dict[str, tuple[str, bool]]:
    return {f"{word}-{name}": each for name, each in FORMATS.items() if name != "qcow2-plain"}


SERVED, CANCELLED, FAR = map(_kind_of_life, ("served", "cancelled", "far"))
# By nbdkit, and by qemu-nbd where the backing is a qcow2 image.
HELPER = {"helper-nbdkit": FORMATS["raw"], "helper-qemu": FORMATS["raw"]}
WHOLE = SERVED | CANCELLED | HELPER
ALL = FORMATS | FAR | WHOLE
CLUSTER = 8192


@dataclass(frozen=True)
class Point:
    """Where a fault is injected; see the module."""

    format: str
    seed: int
    kind: str
    fault: str
    number: int

    def __str__(self) -> str:
        return f"{self.format}/{self.seed}/{self.kind}/{self.fault}/{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Point":
        """Raises ValueError."""
        image_format, seed, kind, fault, number = text.split("/")
        if image_format not in ALL:
            raise ValueError(f"{image_format} is no format: {', '.join(ALL)}")
        return cls(image_format, int(seed), kind, fault, int(number))


def points(image_format: str, seed: int) -> Iterator[Point]:
    """Every point of the scenario, found by a life without faults."""
    shim, canceller, disturber = Shim(), Canceller(), Disturber()
    broken = _judged(image_format, seed, shim, canceller, disturber)
    if broken:
        raise RuntimeError(f"without any fault: {broken}")
    for call, faults in _faults(image_format).items():
        for fault in faults:
            for number in range(shim.counts[call]):
                yield Point(image_format, seed, call, fault, number)
    steps: Mapping[str, int] = {}
    if image_format in FORMATS:
        steps = canceller.counts
    elif image_format in CANCELLED:
        steps = dict.fromkeys(VICTIMS, disturber.steps)
    for victim, count in steps.items():
        for number in range(count):
            yield Point(image_format, seed, victim, CANCEL, number)


def _faults(image_format: str) -> Mapping[str, tuple[str, ...]]:
    """What can fail in a life of this format, and how."""
    if image_format in CANCELLED:
        return {}
    if image_format in HELPER:
        return HELPER_FAULTS
    if image_format in FAR:
        return FAR_FAULTS
    return SERVER_FAULTS if image_format in SERVED else FAULTS


def broken_rules(point: Point) -> list[str]:
    """Run one point; the rules that did not hold."""
    shim, canceller, disturber = Shim(), Canceller(), Disturber()
    if point.fault != CANCEL:
        shim = Shim(point.kind, point.fault, point.number)
    elif point.format in CANCELLED:
        disturber = Disturber(point.kind, point.number)
    else:
        canceller = Canceller(point.kind, point.number)
    return _judged(point.format, point.seed, shim, canceller, disturber)


def _judged(
    image_format: str, seed: int, shim: Shim, canceller: Canceller, disturber: Disturber
) -> list[str]:
    name, extended = ALL[image_format]
    directory = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=directory) as place:
        path = Path(place) / f"leaf.{name}"
        far = Path(place) / "far"  # for qemu-img, which opens what the image names
        far.write_bytes(CONTENT)
        backing = str(far)
        if image_format == "helper-qemu":
            backing = f"qcow2+{far}.qcow2"
            run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", far, f"{far}.qcow2"])
        create_leaf(
            str(path),
            format=name,
            size=SIZE,
            cluster_size=CLUSTER,
            # A server looks who its backing is, and records it.
            backing=BackingReference(backing, "raw", SIZE, "" if image_format in WHOLE else "x"),
            extended_l2=extended,
        )
        life: Life | Served
        if image_format in WHOLE:
            life = Served(path, name, shim, seed, backing, disturber)
        else:
            life = Life(path, name, shim, canceller, seed)
            if image_format in FAR:
                life.backing = failing_once(CONTENT, shim)
        life.run()
        broken = life.oracle.broken
        if life.ended_by and not shim.fired and not canceller.fired:
            broken.append(f"ended without a fault: {life.ended_by!r}")
        # The backing is waited for as long as it takes: its faults fail no request.
        patient = image_format in FAR | HELPER
        if len(life.failed) > (0 if patient else FAILED_MOST):
            broken.append(f"{len(life.failed)} requests failed: {life.failed[:3]}")
        _inspect(life, certain=life.stopped_clean and shim.call not in SYNCS)
        return broken


def _inspect(life: Life | Served, *, certain: bool) -> None:
    """Open the image as its next user does, look at all of it, and check it."""
    broken = life.oracle.broken
    try:
        leaf = open_leaf(str(life.path), format=life.format)
        data = _content(leaf)
        found = leaf.check(repair=False)
        leaf.close()
    except Exception as error:
        broken.append(f"the image does not open: {error!r}")
        return
    life.oracle.check(data, 0, "the image afterwards", durable=not certain)
    if found.errors:
        broken.append(f"our check: {found}")
    if life.format != "raw":
        try:
            run(["qemu-img", "check", "-q", "-f", life.format, life.path])
        except PeerError as error:
            if "exited with 3" not in str(error):  # leaked clusters: harmless
                broken.append(f"qemu-img check: {error}")


def _content(leaf: Leaf) -> bytes:
    """All that a guest sees, with the backing below."""
    data = bytearray(CELLS * CELL)
    while True:
        try:
            extents = list(leaf.extents(0, leaf.size))
            break
        except ColdMetadata as cold:
            cold.warm()
    for extent in extents:
        view = memoryview(data)[extent.offset : extent.end]
        if extent.state is State.UNALLOCATED:
            view[:] = CONTENT[extent.offset : extent.end]
        elif extent.state is not State.ZERO:
            leaf.read(extent, view)
    return bytes(data)
