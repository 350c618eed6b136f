# SPDX-License-Identifier: Apache-2.0
"""Backups made by virtnbdbackup as a backing, against a model of bytes."""

import io
import random
import re
from pathlib import Path
from types import SimpleNamespace

import lz4.frame
import pytest
from libvirtnbdbackup.sparsestream import streamer, types

from nbdstream.backing import Priority, open_backing
from nbdstream.errors import BackingError
from testbed.backups import backup_uri

BLOCK = 64 << 10
BLOCKS = 48
# Frames above this are compressed in several blocks; virtnbdbackup's own limit is 32 MiB.
CHUNK = 3 * BLOCK


async def content_of(backing_uri: str, seed: int = 0) -> bytes:
    """The whole disk, read in pieces of random sizes."""
    rng = random.Random(seed)
    async with open_backing(backing_uri) as backing:
        data = bytearray(backing.size)
        position = 0
        while position < len(data):
            length = min(512 * rng.randint(1, 500), len(data) - position)
            piece = memoryview(data)[position : position + length]
            await backing.read(piece, position, Priority.DEMAND)
            position += length
    return bytes(data)


def backup(
    path: Path, number: int, disk: bytes, changed: set[int] | None, *, compressed: bool
) -> Path:
    """Write the backup of a disk with virtnbdbackup's own writer. ``changed``: the numbers of
    the blocks that an incremental backup has; None for a full one."""
    stream = streamer.SparseStream(types)
    kinds = types.SparseStreamTypes()
    blocks = [disk[at : at + BLOCK] for at in range(0, len(disk), BLOCK)]
    has = [
        any(block) if changed is None else index in changed for index, block in enumerate(blocks)
    ]
    arguments = SimpleNamespace(
        compress=2 if compressed else False,
        level="full" if changed is None else "inc",
        cpt=SimpleNamespace(name=f"cp.{number}", parent=f"cp.{number - 1}" if number else ""),
    )
    writer, trailer = io.BytesIO(), []
    named = SimpleNamespace(target="vda", format="qcow2")
    header = stream.dumpMetadata(arguments, len(disk), sum(has) * BLOCK, named)
    stream.writeFrame(writer, kinds.META, 0, len(header))
    writer.write(header + kinds.TERM)
    first = 0
    while first < len(blocks):
        last = first
        while last < len(blocks) and has[last] == has[first]:
            last += 1
        data = b"".join(blocks[first:last])
        kind = kinds.DATA if has[first] else kinds.ZERO
        stream.writeFrame(writer, kind, first * BLOCK, len(data))
        if has[first]:
            pieces = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
            if compressed:
                pieces = [lz4.frame.compress(piece) for piece in pieces]
            writer.write(b"".join(pieces) + kinds.TERM)
            sizes = [len(piece) for piece in pieces]
            trailer.append(sizes[0] if len(sizes) == 1 else {str(first * BLOCK): sizes})
        first = last
    stream.writeFrame(writer, kinds.STOP, 0, 0)
    if compressed:
        stream.writeCompressionTrailer(writer, trailer)
    path.write_bytes(writer.getvalue())
    return path


class Backups:
    """A disk that changes, and a backup of each of its states."""

    def __init__(self, directory: Path, seed: int, *, compressed: bool) -> None:
        self._rng = random.Random(seed)
        self._directory = directory
        self._compressed = compressed
        self._disk = bytearray(BLOCKS * BLOCK)
        self.files: list[Path] = []
        self.states: list[bytes] = []
        self.save_more()

    def save_more(self) -> None:
        """Change the disk, and back it up: incrementally but for the first time."""
        changed = self._change()
        number = len(self.files)
        path = self._directory / f"vda.{f'inc.{number}' if number else 'full'}.data"
        self.states.append(bytes(self._disk))
        self.files.append(
            backup(
                path,
                number,
                self.states[-1],
                changed if number else None,
                compressed=self._compressed,
            )
        )

    def _change(self) -> set[int]:
        changed = set()
        for _ in range(self._rng.randint(0, 6)):
            first = self._rng.randrange(BLOCKS)
            for number in range(first, min(first + self._rng.randint(1, 8), BLOCKS)):
                zero = self._rng.random() < 0.2
                block = bytes(BLOCK) if zero else self._rng.randbytes(BLOCK)
                self._disk[number * BLOCK : (number + 1) * BLOCK] = block
                changed.add(number)
        return changed


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("seed", range(3))
async def test_each_state_of_the_disk(tmp_path: Path, seed: int, compressed: bool) -> None:
    backups = Backups(tmp_path, seed, compressed=compressed)
    for _ in range(3):
        backups.save_more()
    for count, state in enumerate(backups.states, 1):
        assert await content_of(backup_uri(backups.files[:count]), seed) == state


async def refused(*files: Path) -> str:
    with pytest.raises(BackingError) as caught:
        await content_of(backup_uri(files))
    return re.sub(r".*?(nbdkit|error): ", "", str(caught.value))


async def test_backups_that_do_not_belong_together(tmp_path: Path) -> None:
    backups = Backups(tmp_path, 1, compressed=False)
    backups.save_more()
    backups.save_more()
    full, first, second = backups.files
    assert "a backup is missing" in await refused(full, second)
    assert "the full one has to come first" in await refused(first, second)
    assert "it has to come first" in await refused(full, full)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
async def test_a_backup_that_was_cut_short(tmp_path: Path, compressed: bool) -> None:
    whole = Backups(tmp_path, 2, compressed=compressed).files[0].read_bytes()
    cut = tmp_path / "cut.data"
    for length in (0, 20, 300, len(whole) // 2, len(whole) - 30):
        cut.write_bytes(whole[:length])
        assert "not a complete backup" in await refused(cut)


async def test_a_raw_image_is_no_backup(tmp_path: Path) -> None:
    raw = tmp_path / "raw.data"
    raw.write_bytes(random.Random(3).randbytes(BLOCK))
    assert "not a complete backup" in await refused(raw)
