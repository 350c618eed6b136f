# SPDX-License-Identifier: Apache-2.0
"""Tables damaged at random, repaired, and judged by QEMU.

    NBDSTREAM_DAMAGE=2000 NBDSTREAM_SEED=7 pytest tests/test_leaf_random_damage.py

The rule: after our repair qemu-img finds nothing, and what was not under an entry that was
damaged is as before. Before it, a damaged image is served or refused, and no
write to it reaches a table or another place of the disk.
"""

import os
import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdstream.errors import LeafError
from nbdstream.leaf import open_leaf
from testbed.peers import run
from tests.leaf_support import (
    ImageKind,
    by_qemu,
    ours,
    pattern,
    plain,
    qemu_check_report,
    read,
    write,
)

COUNT = int(os.environ.get("NBDSTREAM_DAMAGE", "12"))
SEED = int(os.environ.get("NBDSTREAM_SEED", "1"))
SIZE = 2 << 20
UNIT = 64 << 10
KINDS = [
    plain(4096),
    ours("qcow2", 16384),
    by_qemu("qcow2", "cluster_size=512,refcount_bits=1"),
    by_qemu("qcow2", "cluster_size=64k,refcount_bits=64"),
    by_qemu("qcow2", "cluster_size=4k,refcount_bits=8,compression_type=zstd"),
    ours("qed", 4096),
]


@dataclass(frozen=True)
class Table:
    """A table in the file: where it is, its words, the guest offset and range of its first
    entry (0: it is no L1 or L2 table), and words per entry."""

    offset: int
    words: int
    start: int = 0
    span: int = 0
    step: int = 1


def qcow2_tables(image: bytes) -> Iterator[Table]:
    (bits,) = struct.unpack_from(">I", image, 20)
    l1, refcounts = struct.unpack_from(">QQ", image, 40)
    features = struct.unpack_from(">Q", image, 72)[0]
    step = 2 if features & 16 else 1
    cluster = 1 << bits
    span = cluster // (8 * step) * cluster
    yield Table(refcounts, cluster // 8)
    for entry in struct.unpack_from(f">{cluster // 8}Q", image, refcounts):
        if entry:
            yield Table(entry, cluster // 8)
    used = -(-SIZE // span)
    yield Table(l1, used, 0, span)
    for index, entry in enumerate(struct.unpack_from(f">{used}Q", image, l1)):
        if entry:
            offset = entry & 0x00FFFFFFFFFFFE00
            yield Table(offset, cluster // 8, index * span, cluster, step)


def qed_tables(image: bytes) -> Iterator[Table]:
    cluster, size = struct.unpack_from("<II", image, 4)
    (l1,) = struct.unpack_from("<Q", image, 40)
    words = cluster * size // 8
    used = -(-SIZE // (words * cluster))
    yield Table(l1, used, 0, words * cluster)
    for index, entry in enumerate(struct.unpack_from(f"<{used}Q", image, l1)):
        if entry:
            yield Table(entry, words, index * words * cluster, cluster)


def make(path: Path, kind: ImageKind) -> None:
    """An image with data, zeroes, gaps and, where the format has it, compressed clusters."""
    kind.make(path, SIZE, None)
    leaf = kind.open(path)
    for at in range(0, SIZE, 3 * UNIT):
        write(leaf, at, pattern(at, UNIT, 1))
    leaf.zero(0, UNIT // 2, unmap=True)
    leaf.close()
    if kind.format == "qcow2":
        run(["qemu-io", "-f", "qcow2", "-c", f"write -c -P 7 {UNIT} {UNIT}", path])


def value(rng: random.Random, image: bytearray, old: int, unit: int) -> int:
    """What a damaged word says: at random, but often nearly right."""
    inside = rng.randrange(len(image) // unit) * unit
    flags = rng.choice((0, 1 << 63, 1 << 63, 1, 1 << 62))
    return rng.choice(
        (
            old ^ 1 << rng.randrange(64),
            old ^ 1 << rng.randrange(64),
            inside | flags,
            inside | flags,
            len(image) + rng.randrange(4) * unit | flags,
            rng.randrange(1 << 64),
            0,
            old + unit & (1 << 64) - 1,
        )
    )


def damage(image: bytearray, kind: ImageKind, rng: random.Random) -> set[int]:
    """Damage some words; the guest ranges, in sectors, under an entry that was changed."""
    order, tables = ("<Q", qed_tables) if kind.format == "qed" else (">Q", qcow2_tables)
    places = list(tables(bytes(image)))
    hit: set[int] = set()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        table = rng.choice(places)
        # Most tables are mostly empty: rather where there is something.
        used = [n for n in range(table.words) if any(image[table.offset + 8 * n :][:8])]
        word = rng.choice(used if used and rng.random() < 0.8 else range(table.words))
        place = table.offset + 8 * word
        (old,) = struct.unpack_from(order, image, place)
        new = value(rng, image, old, 512 if rng.random() < 0.2 else 4096)
        struct.pack_into(order, image, place, new)
        if table.span:
            start = table.start + word // table.step * table.span
            hit.update(range(start, min(start + table.span, SIZE), 512))
            hit |= shared(image, new, kind)
    return hit


def shared(image: bytearray, entry: int, kind: ImageKind) -> set[int]:
    """The ranges whose entries lead to where a damaged one does now: which of both is right is
    nowhere to be seen."""
    order, tables = ("<Q", qed_tables) if kind.format == "qed" else (">Q", qcow2_tables)
    mask = (1 << 64) - 1 if kind.format == "qed" else 0x00FFFFFFFFFFFE00
    hit: set[int] = set()
    for table in tables(bytes(image)):
        for word in range(0, table.words if table.span else 0, table.step):
            place = table.offset + 8 * word
            if place + 8 > len(image):
                break
            (other,) = struct.unpack_from(order, image, place)
            if other and other & mask == entry & mask:
                start = table.start + word // table.step * table.span
                hit.update(range(start, min(start + table.span, SIZE), 512))
    return hit


def content(path: Path, kind: ImageKind) -> bytes:
    """What the disk has; nonsense where it cannot be read."""
    leaf = open_leaf(str(path), read_only=True, format=kind.format)
    parts = []
    for at in range(0, SIZE, 512):
        try:
            parts.append(read(leaf, at, 512, b""))
        except OSError:  # a damaged entry may call data compressed that is not
            parts.append(b"nonsense" * 64)
    leaf.close()
    return b"".join(parts)


def assert_untouched(now: bytes, before: bytes, hit: set[int]) -> None:
    wrong = [
        at
        for at in range(0, SIZE, 512)
        if at not in hit and now[at : at + 512] != before[at : at + 512]
    ]
    assert not wrong, f"changed at {wrong[0]:#x} and {len(wrong) - 1} more sectors"


def use(path: Path, kind: ImageKind, before: bytearray) -> bytes | None:
    """Write where that is possible, and note it in ``before``; that as bytes, or None if the image
    is refused."""
    try:
        leaf = kind.open(path)
    except LeafError as error:
        assert "\n" not in str(error)
        return None
    try:
        for at in range(0, SIZE, 5 * UNIT):
            data = pattern(at, UNIT, 9)
            with suppress(LeafError, OSError):  # under damage, or an allocation refused
                write(leaf, at, data)
                before[at : at + UNIT] = data
        leaf.close()
    except LeafError as error:
        assert "\n" not in str(error)
        leaf.close()
    return bytes(before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_under_the_damage_survives_it(kind: ImageKind, tmp_path: Path) -> None:
    sound, path = tmp_path / "sound", tmp_path / "disk"
    make(sound, kind)
    image, before = sound.read_bytes(), content(sound, kind)
    for number in range(COUNT):
        rng = random.Random(f"{SEED} {number}")
        damaged = bytearray(image)
        hit = damage(damaged, kind, rng)
        try:
            path.write_bytes(damaged)
            repair(path, kind, before, hit)
            path.write_bytes(damaged)
            use_and_repair(path, kind, before, hit)
        except BaseException as error:
            error.add_note(f"NBDSTREAM_SEED={SEED}, image {number}")
            (tmp_path / "failed").write_bytes(damaged)
            raise


def repair(path: Path, kind: ImageKind, before: bytes, hit: set[int]) -> None:
    try:
        leaf = open_leaf(str(path), format=kind.format, repair=True)
    except LeafError as error:
        assert "\n" not in str(error)
        return
    leaf.check(repair=True)
    left = leaf.check(repair=False)
    leaf.close()
    status, report = qemu_check_report(path, kind.format)
    if not left.errors:
        assert status in (0, 3), report
        assert_untouched(content(path, kind), before, hit)


def use_and_repair(path: Path, kind: ImageKind, before: bytes, hit: set[int]) -> None:
    """The same for an image that was written to in between."""
    expected = bytearray(before)
    if use(path, kind, expected) is not None:
        repair(path, kind, bytes(expected), hit)
