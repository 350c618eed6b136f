# SPDX-License-Identifier: Apache-2.0
"""Images with hash trees that veritysetup made."""

import random
from dataclasses import dataclass
from pathlib import Path

from nbdstream.verity import (
    BLOCK,
    SUPERBLOCK_LENGTH,
    HashTree,
    decode_superblock,
    parse_root_hash,
)
from testbed.peers import run

NAME = "image.verity"


@dataclass(frozen=True)
class Published:
    """An image with its hash tree and the root hash, from veritysetup."""

    image: Path
    tree_file: Path
    root: str

    def tree(self, kept_most: int = 4096) -> HashTree:
        superblock = decode_superblock(self.tree_file.read_bytes()[:SUPERBLOCK_LENGTH], NAME)
        return HashTree(superblock, parse_root_hash(self.root), NAME, kept_most)

    def read(self, wanted: list[int]) -> dict[int, bytes]:
        """Tree blocks, as far as the file has them."""
        stored = self.tree_file.read_bytes()
        return {each: stored[each * BLOCK : (each + 1) * BLOCK] for each in wanted}

    def digests(self, tree: HashTree, first: int, count: int) -> list[bytes]:
        """The digests of what the image has."""
        with self.image.open("rb") as file:
            file.seek(first * BLOCK)
            return tree.kind.digests(memoryview(file.read(count * BLOCK)), BLOCK)


def publish(directory: Path, blocks: int, *options: str) -> Published:
    """An image with data here and there, and its tree."""
    image, tree_file = directory / "image", directory / NAME
    with image.open("wb") as file:
        file.truncate(blocks * BLOCK)
        for block in {0, blocks // 3, blocks // 2, blocks - 1}:
            file.seek(block * BLOCK)
            file.write(random.Random(block).randbytes(BLOCK))
    told = run(["veritysetup", "format", *options, image, tree_file])
    lines = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    return Published(image, tree_file, lines["Root hash"].strip())
