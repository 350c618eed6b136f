# SPDX-License-Identifier: Apache-2.0
"""Verified bytes: nothing but what was published is ever returned."""

import random
from pathlib import Path

import pytest

from nbdstream.backing.base import Priority
from nbdstream.backing.verified import VerifiedBacking
from nbdstream.errors import BackingMismatchError, BackingReadError, VerificationError
from nbdstream.extents import BackingExtent
from nbdstream.verity import BLOCK
from tests.doubles import GatedBacking
from tests.verity_support import publish

BLOCKS = 300
DATA = {0, 100, 150, 299}


class Liar(GatedBacking):
    """Serves ``content`` with one bit changed, as often as ``lies`` says."""

    def __init__(self, content: bytes, changed: int = 0, lies: int = 0) -> None:
        super().__init__(content)
        self.changed, self.lies = changed, lies

    async def read(self, view: memoryview, offset: int, *rest: object) -> None:
        await super().read(view, offset, Priority.DEMAND)
        if self.lies and offset <= self.changed < offset + len(view):
            self.lies -= 1
            view[self.changed - offset] ^= 1


@pytest.fixture
def far(tmp_path: Path) -> "Far":
    published = publish(tmp_path, BLOCKS)
    image, tree = Liar(published.image.read_bytes()), Liar(published.tree_file.read_bytes())
    return image, tree, VerifiedBacking(image, published.tree(), tree)


Far = tuple[Liar, Liar, VerifiedBacking]


async def read(backing: VerifiedBacking, offset: int, length: int) -> bytes:
    data = bytearray(length)
    await backing.read(memoryview(data), offset, Priority.DEMAND)
    return bytes(data)


async def test_what_was_published_is_read_in_any_pieces(far: Far) -> None:
    image, tree, backing = far
    order = random.Random(1)
    for _ in range(100):
        offset = order.randrange(image.size)
        length = order.randrange(1, min(image.size - offset, 40 * BLOCK) + 1)
        assert await read(backing, offset, length) == image.content[offset : offset + length]
    assert await read(backing, 0, image.size) == image.content
    assert sum(each.length for each in tree.reads) == 4 * BLOCK, "each tree block was read once"


@pytest.mark.parametrize("length", [BLOCK, 100, 40 * BLOCK])
@pytest.mark.parametrize("lies", [1, 2])
async def test_a_changed_block_is_read_again_and_then_refused(
    far: Far, length: int, lies: int
) -> None:
    image, _tree, backing = far
    offset = 99 * BLOCK + (50 if length == 100 else 0)
    image.changed, image.lies = offset + length // 2, lies
    if lies == 1:
        assert await read(backing, offset, length) == image.content[offset : offset + length]
        return
    where = image.changed // BLOCK * BLOCK
    with pytest.raises(VerificationError, match=f"^memory:: the block at offset {where} does not"):
        await read(backing, offset, length)
    # Only a read that needs it fails, and only while it is wrong.
    assert await read(backing, 0, BLOCK) == image.content[:BLOCK]
    assert await read(backing, offset, length) == image.content[offset : offset + length]


@pytest.mark.parametrize("position", [1, 2, 4])
@pytest.mark.parametrize("lies", [1, 2])
async def test_a_changed_tree_block_is_read_again_and_then_refused(
    far: Far, position: int, lies: int
) -> None:
    image, tree, backing = far
    tree.changed, tree.lies = position * BLOCK + 7, lies
    if lies == 2:
        with pytest.raises(VerificationError, match=f"root hash at offset {position * BLOCK}$"):
            await read(backing, 0, image.size)
    assert await read(backing, 0, image.size) == image.content


async def test_the_tree_says_what_is_zero_whatever_the_server_reports(far: Far) -> None:
    image, _tree, backing = far
    image.holes, image.known = [(0, image.size)], True
    assert not backing.known_zero(0, BLOCK)
    found = await backing.extents(0, image.size)
    assert found[0] == BackingExtent(0, BLOCK, zero=False)
    zero = {
        n for each in found if each.zero for n in range(each.offset // BLOCK, each.end // BLOCK)
    }
    assert zero == set(range(BLOCKS)) - DATA
    assert backing.known_zero(BLOCK, 99 * BLOCK)
    assert not backing.known_zero(99 * BLOCK, 2 * BLOCK)
    assert await backing.extents(5 * BLOCK + 1, 100) == [BackingExtent(5 * BLOCK + 1, 100, True)]
    assert image.reads == []


async def test_an_error_of_either_server_is_passed_on(far: Far) -> None:
    image, tree, backing = far
    for each in (tree, image):
        each.error = BackingReadError("told to fail")
        with pytest.raises(BackingReadError, match="told to fail"):
            await read(backing, 0, BLOCK)
        each.error = None


def test_an_image_or_tree_of_another_size_is_refused(far: Far) -> None:
    image, tree, backing = far
    for content in (image.content[:-BLOCK], image.content + bytes(512)):
        with pytest.raises(BackingMismatchError, match=r"it is of another image$"):
            VerifiedBacking(Liar(content), backing._tree, tree)
    with pytest.raises(VerificationError, match=r"it was cut short$"):
        VerifiedBacking(image, backing._tree, Liar(tree.content[:-1]))
