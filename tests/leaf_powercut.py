# SPDX-License-Identifier: Apache-2.0
"""A leaf under power cuts: a busy life is recorded, then cut at every point.

Every image that may be left is opened and held to invariants 2 and 3 of the design:
each sector that a guest sees is what the last completed flush made durable or something
newer, and nothing else: no other sector's bytes, no other cluster's, no zeroes that no guest
wrote. What is unallocated shows the backing, whose content the leaf started from, so
"flushed data became unallocated" fails the same test. Then the leaf has to check clean,
to take new writes, and to keep all the rest while it does.
"""

import random
from collections.abc import Mapping
from pathlib import Path

from nbdstream.leaf.base import Leaf, State, SyncError
from testbed.leaves import flush
from tests.journal import recording
from tests.leaf_life import NOTHING, ZEROES, Change, Life, Player, backing_of
from tests.leaf_support import (
    BACKING,
    SECTOR,
    ImageKind,
    extents,
    pattern,
    qemu_check,
    read,
    sector_content,
    write,
    zero,
)
from tests.powercut import Disk

QEMU_CHECK_EVERY = 400  # qemu-img takes longer than all the rest of a cut
CUT_AGAIN_EVERY = 50


def fail_each_sync(
    kind: ImageKind, directory: Path, cut: Path, *, seed: int, finish: bool, variants: int
) -> int:
    """Let a leaf live the same short life again and again, with another sync failing each
    time, and judge what may be left at the end. Returns how many syncs failed."""
    size = (1 << 20) + 512
    windows: tuple[tuple[int, int], ...] = ((0, 16 * 4096), ((1 << 20) - 8 * 4096, 8 * 4096 + 512))
    if finish:
        size = 64 * 1024
        windows = ((0, size),)
    kind.make(directory / "disk", size, BACKING)
    fresh = {file.name: file.read_bytes() for file in directory.iterdir()}
    failed = 0
    while _live_with_failure(
        kind, directory, cut, seed, size, windows, failed, finish=finish, variants=variants
    ):
        restore(directory, fresh)
        failed += 1
    return failed


def _live_with_failure(
    kind: ImageKind,
    directory: Path,
    cut: Path,
    seed: int,
    size: int,
    windows: tuple[tuple[int, int], ...],
    number: int,
    *,
    finish: bool,
    variants: int,
) -> bool:
    """One life of the image in ``directory`` with the ``number``-th sync failing; False if it
    has not that many."""
    path = directory / "disk"
    with recording(directory) as journal:
        life = Life(kind, size, windows, journal)
        journal.fail_sync = number
        try:
            leaf = kind.open(path)
        except SyncError:
            pass  # it is judged as it was left
        else:
            life.identified = leaf.backing is not None and leaf.backing.identity != ""
            _play_until_it_fails(Player(life, leaf, random.Random(seed), path), finish=finish)
    if journal.fail_sync is not None:
        return False
    rng = random.Random(seed + number)
    for variant in range(variants):
        disk = Disk(journal, rng if variant else None)
        admissible = _Admissible(life)
        for operation in journal.operations:
            disk.advance(operation)
        admissible.advance(len(journal.operations))
        restore(cut, disk.survivors(rng))
        try:
            _judge(life, cut / "disk", admissible.sets(), rng, number * variants + variant)
        except Exception as error:
            error.add_note(f"sync {number} failed, variant {variant}")
            error.add_note(f"operations: {[_brief(o) for o in journal.operations[-20:]]}")
            raise
    return True


def _play_until_it_fails(player: Player, *, finish: bool) -> None:
    try:
        for _ in range(25):
            player.step()
        if finish:
            player.finish()
        player.leaf.close()
    except SyncError:
        if player.leaf.fd >= 0:
            player.go_on()


class _Admissible:
    """What each sector may show at a cut."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._begun = 0  # how many of the changes had begun
        self._covered = 0  # how many of them the last completed flush covers
        self._flushes = 0
        self._base: dict[int, bytes] = {}  # by that flush, where it is not the backing's

    def advance(self, position: int) -> None:
        changes, flushes = self._life.changes, self._life.flushes
        while self._begun < len(changes) and changes[self._begun].position <= position:
            self._begun += 1
        while self._flushes < len(flushes) and flushes[self._flushes].position <= position:
            covered = flushes[self._flushes].covered
            for change in changes[self._covered : covered]:
                self._set(change)
            self._covered = covered
            self._flushes += 1

    def _set(self, change: Change) -> None:
        for index, content in enumerate(change.contents):
            self._base[change.first + index] = content

    def sets(self) -> dict[int, set[bytes]]:
        """The contents allowed for each sector that ever changed."""
        allowed = {sector: {content} for sector, content in self._base.items()}
        for change in self._life.changes[self._covered : self._begun]:
            for index, content in enumerate(change.contents):
                sector = change.first + index
                if sector not in allowed:
                    allowed[sector] = {sector_content(0, sector)}
                allowed[sector].add(content)
        return allowed


def cut_everywhere(life: Life, directory: Path, *, seed: int, variants: int, every: int = 1) -> int:
    """Cut the power at every operation of the journal (or each ``every``-th), ``variants``
    times each, and judge what is left in ``directory``. Returns how many were judged."""
    rng = random.Random(seed)
    disk = Disk(life.journal)
    admissible = _Admissible(life)
    judged = 0
    operations = life.journal.operations
    for position in range(len(operations) + 1):
        if position:
            disk.advance(operations[position - 1])
        if position % every:
            continue
        admissible.advance(position)
        allowed = admissible.sets()
        for variant in range(variants):
            left = disk.survivors(rng)
            try:
                restore(directory, left)
                _judge(life, directory / "disk", allowed, rng, judged)
                if judged % CUT_AGAIN_EVERY == 0:
                    judged += _cut_again(life, directory, left, allowed, rng)
            except Exception as error:
                error.add_note(f"cut at {position} of {len(operations)}, variant {variant}")
                error.add_note(f"operations: {[_brief(o) for o in operations[:position][-12:]]}")
                raise
            judged += 1
    return judged


def restore(directory: Path, left: Mapping[str, bytes | bytearray]) -> None:
    """Have a directory hold these files, by name, and no others."""
    for old in directory.iterdir():
        old.unlink()
    for name, content in left.items():
        with (directory / name).open("wb") as image:
            image.truncate(len(content))
            for start in range(0, len(content), len(NOTHING)):
                piece = content[start : start + len(NOTHING)]
                if piece != NOTHING[: len(piece)]:  # images are sparse, and there are thousands
                    image.seek(start)
                    image.write(piece)


def _cut_again(
    life: Life,
    directory: Path,
    left: dict[str, bytearray],
    allowed: dict[int, set[bytes]],
    rng: random.Random,
) -> int:
    """The power goes once more while the leaf is opened, and perhaps repaired, and closed:
    nothing that was there may be lost by that."""
    restore(directory, left)
    with recording(directory) as journal:
        life.kind.open(directory / "disk").close()
    disk = Disk(journal)
    for position, operation in enumerate(journal.operations):
        disk.advance(operation)
        restore(directory, disk.survivors(rng))
        try:
            _judge(life, directory / "disk", allowed, rng, 1)
        except Exception as error:
            error.add_note(f"cut again, at {position + 1} of {len(journal.operations)}")
            raise
    return len(journal.operations)


def _brief(operation: object) -> str:
    data = getattr(operation, "data", None)
    if data is None:
        return repr(operation)
    return f"Write({operation.inode}, {operation.offset}, {len(data)} bytes)"  # type: ignore[attr-defined]


def _judge(
    life: Life, path: Path, allowed: dict[int, set[bytes]], rng: random.Random, judged: int
) -> None:
    leaf = life.kind.open(path)
    backing = backing_of(life.size)
    try:
        if leaf.backing is None:
            assert not _unallocated(leaf)
        else:
            assert leaf.backing.uri == BACKING.uri
            assert leaf.backing.identity or not life.identified
        seen = {window: read(leaf, *window, backing) for window in life.windows}
        for (start, _), content in seen.items():
            for at in range(0, len(content), SECTOR):
                sector = (start + at) // SECTOR
                found = content[at : at + SECTOR]
                expected = allowed.get(sector) or {sector_content(0, sector)}
                assert found in expected, (
                    f"sector {sector} shows {_name(found)},"
                    f" not one of {[_name(content) for content in expected]}"
                )
        result = leaf.check(repair=False)
        assert result.errors == 0, result
        # A raw leaf may have stored what does not count; QED repairs leaks when opened.
        assert result.leaks == 0 or life.kind.format != "qed", result
        _live_on(life, leaf, path, seen, backing, rng)
    finally:
        leaf.close()
    if judged % QEMU_CHECK_EVERY == 0:
        qemu_check(path, life.kind.format)


def _live_on(
    life: Life,
    leaf: Leaf,
    path: Path,
    seen: dict[tuple[int, int], bytes],
    backing: bytes,
    rng: random.Random,
) -> None:
    """New writes must not disturb what survived, now or after a reopen."""
    version = 1 << 30
    expected = {window: bytearray(content) for window, content in seen.items()}
    for _ in range(3):
        (start, length), content = rng.choice(list(expected.items()))
        block = rng.randrange(-(-length // leaf.block_size)) * leaf.block_size
        size = min(leaf.block_size, length - block)
        version += 1
        if rng.random() < 0.75:
            data = pattern(start + block, size, version)
            write(leaf, start + block, data)
        else:
            data = bytes(size)
            zero(leaf, start + block, size)
        content[block : block + size] = data
    flush(leaf)
    for window, content in expected.items():
        assert read(leaf, *window, backing) == content
    leaf.close()
    again = life.kind.open(path, read_only=True)
    try:
        for window, content in expected.items():
            assert read(again, *window, backing) == content
        assert again.check(repair=False).errors == 0
    finally:
        again.close()


def _unallocated(leaf: Leaf) -> bool:
    return any(extent.state is State.UNALLOCATED for extent in extents(leaf))


def _name(content: bytes) -> str:
    """A sector's content in words."""
    if content == ZEROES:
        return "zeroes"
    word = int.from_bytes(content[:8], "little")
    if content == content[:8] * (SECTOR // 8) and word >> 63:
        return f"version {word >> 32 & 0x7FFFFFFF} of sector {word & 0xFFFFFFFF}"
    return f"garbage {content[:16].hex()}…"
