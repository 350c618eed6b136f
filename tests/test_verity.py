# SPDX-License-Identifier: Apache-2.0
"""dm-verity's hash trees as veritysetup makes them, and what a tree that lies comes to."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.errors import UsageError, VerificationError
from nbdstream.verity import (
    BLOCK,
    SUPERBLOCK_LENGTH,
    HashTree,
    Layout,
    decode_superblock,
    parse_root_hash,
)
from tests.verity_support import NAME, publish


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (1, ()),
        (2, ()),
        (128, ("--salt=-",)),
        (129, ("--salt=aa55",)),
        (64, ("--hash=sha512",)),
        (4097, ("--hash=sha512", "--salt=" + 256 * "5a")),
        (16384, ()),
        (16385, ()),
    ],
)
def test_all_of_an_image_fits_the_tree_that_veritysetup_made(
    tmp_path: Path, blocks: int, options: tuple[str, ...]
) -> None:
    published = publish(tmp_path, blocks, *options)
    tree = published.tree()
    assert tree.layout.blocks == blocks
    assert published.tree_file.stat().st_size == tree.layout.end * BLOCK
    for first, count in ((0, blocks), (blocks - 1, 1), (blocks // 3, 1 + blocks // 2)):
        proof = published.tree().proof(first, count)
        digests = proof.settle(published.read(proof.wanted))
        assert digests == published.digests(tree, first, count)


def test_what_is_known_is_not_asked_for_again_and_survives_being_forgotten(tmp_path: Path) -> None:
    published = publish(tmp_path, 16385)
    tree = published.tree(kept_most=3)
    first = tree.proof(0, 1)
    assert len(first.wanted) == 3
    first.settle(published.read(first.wanted))
    again = tree.proof(127, 1)
    assert again.wanted == []
    other = tree.proof(16384, 1)
    assert len(other.wanted) == 2
    other.settle(published.read(other.wanted))
    assert tree.proof(0, 1).wanted, "only three blocks are kept"
    assert again.settle({}) == published.digests(tree, 127, 1)


def test_each_bit_of_the_tree_is_proved(tmp_path: Path) -> None:
    published = publish(tmp_path, 129)
    order = random.Random(1)
    for position in range(1, 4):
        for _ in range(50):
            tree = published.tree()
            proof = tree.proof(0, 129)
            read = published.read(proof.wanted)
            block = bytearray(read[position])
            block[order.randrange(BLOCK)] ^= 1 << order.randrange(8)
            with pytest.raises(VerificationError, match=f"at offset {position * BLOCK}$"):
                proof.settle(read | {position: bytes(block)})
            assert position in tree.proof(0, 129).wanted
            # What was read right heals it.
            assert proof.settle(read) == published.digests(tree, 0, 129)


@pytest.mark.parametrize("length", [0, BLOCK - 1])
def test_a_tree_that_is_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    published = publish(tmp_path, 2)
    proof = published.tree().proof(1, 1)
    with pytest.raises(VerificationError, match="does not fit the root hash"):
        proof.settle({1: published.read([1])[1][:length]})


def test_a_changed_image_and_a_hole_that_is_none_have_other_digests(tmp_path: Path) -> None:
    published = publish(tmp_path, 9)
    tree = published.tree()
    proof = tree.proof(0, 9)
    digests = proof.settle(published.read(proof.wanted))
    [zeroes] = tree.kind.digests(memoryview(bytes(BLOCK)), BLOCK)
    assert [digest == zeroes for digest in digests] == [
        block not in {0, 3, 4, 8} for block in range(9)
    ]
    changed = bytearray(published.image.read_bytes())
    changed[5 * BLOCK + 17] ^= 4
    other = tree.kind.digests(memoryview(changed), BLOCK)
    assert [block for block in range(9) if other[block] != digests[block]] == [5]


def test_a_root_hash_of_another_image_or_algorithm_is_refused(tmp_path: Path) -> None:
    published = publish(tmp_path, 2)
    superblock = decode_superblock(published.tree_file.read_bytes(), NAME)
    proof = HashTree(superblock, bytes(32), NAME).proof(0, 1)
    with pytest.raises(VerificationError, match="does not fit the root hash"):
        proof.settle(published.read(proof.wanted))
    with pytest.raises(VerificationError, match="has 512 bits: it is of another tree"):
        HashTree(superblock, bytes(64), NAME)


def test_what_the_tree_does_not_cover_has_no_proof(tmp_path: Path) -> None:
    tree = publish(tmp_path, 2).tree()
    for first, count in ((0, 3), (2, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="of 2"):
            tree.proof(first, count)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"Verity", "no superblock"),
        (8, b"\x02", "version 2 with hash type 1 is not supported"),
        (12, b"\x00", "version 1 with hash type 0 is not supported"),
        (32, b"md5\0\0\0", "hash algorithm b'md5' is not supported"),
        (64, b"\x00\x02", "data blocks of 512 and hash blocks of 4096 bytes"),
        (68, b"\x00\x04", "data blocks of 4096 and hash blocks of 1024 bytes"),
        (72, bytes(8), "damaged: a salt of 32 bytes, 0 blocks"),
        (72, b"\xff" * 8, "damaged"),
        (80, b"\x01\x01", "damaged: a salt of 257 bytes"),
    ],
)
def test_a_superblock_that_cannot_be_used_is_refused(
    tmp_path: Path, offset: int, value: bytes, message: str
) -> None:
    data = bytearray(publish(tmp_path, 2).tree_file.read_bytes())
    data[offset : offset + len(value)] = value
    with pytest.raises(VerificationError, match=message) as caught:
        decode_superblock(bytes(data), NAME)
    assert str(caught.value).startswith(f"{NAME}: ")
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=SUPERBLOCK_LENGTH + 8))
def test_any_bytes_are_a_superblock_or_refused(data: bytes) -> None:
    for each in (data, b"verity\0\0\1\0\0\0\1\0\0\0" + data + bytes(SUPERBLOCK_LENGTH)):
        try:
            assert decode_superblock(each, NAME).blocks > 0
        except VerificationError:
            pass


@pytest.mark.parametrize("text", ["", "ab", 63 * "a", 64 * "g", 65 * "a", 64 * "٣", " " + 63 * "a"])
def test_what_is_no_root_hash_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a root hash"):
        parse_root_hash(text)
    assert parse_root_hash(32 * "aB") == bytes([0xAB]) * 32


@given(st.integers(1, 1 << 50), st.sampled_from([32, 64]), st.data())
def test_each_level_proves_the_one_below(blocks: int, digest: int, data: st.DataObject) -> None:
    layout = Layout(blocks, digest)
    first = data.draw(st.integers(0, blocks - 1))
    count = data.draw(st.integers(1, min(1000, blocks - first)))
    path = layout.path(first, count)
    below, width = range(first, first + count), blocks
    for level, positions in enumerate(path):
        start = layout.starts[level]
        indexes = range(positions.start - start, positions.stop - start)
        assert layout.widths[level] == -(-width // layout.fan)
        assert indexes.start * layout.fan <= below.start < (indexes.start + 1) * layout.fan
        assert (indexes.stop - 1) * layout.fan < below.stop <= indexes.stop * layout.fan
        below, width = indexes, layout.widths[level]
    assert width == 1
    assert below in (range(1), range(first, first + 1))
    # The levels lie one behind another, the top first, with no gap.
    ends = [start + wide for start, wide in zip(layout.starts, layout.widths, strict=True)]
    assert [*ends[::-1]] == [*layout.starts[-2::-1], layout.end][: len(ends)]
    assert not path or path[-1] == range(1, 2)
