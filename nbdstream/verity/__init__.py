# SPDX-License-Identifier: Apache-2.0
"""dm-verity's format: what proves that a block of an image is the one that was published.

The proof is a tree of hashes, which lies beside the image. Its root hash comes from the publisher.
With the root hash each block can be checked by itself, and neither the server of the image nor that
of the tree has to be trusted. ``veritysetup format`` makes such a tree and prints the root hash.

No module here does I/O.
"""

from nbdstream.verity.hashes import HashKind, parse_root_hash
from nbdstream.verity.layout import BLOCK, Layout
from nbdstream.verity.proof import HashTree, Proof
from nbdstream.verity.superblock import SUPERBLOCK_LENGTH, Superblock, decode_superblock

__all__ = [
    "BLOCK",
    "SUPERBLOCK_LENGTH",
    "HashKind",
    "HashTree",
    "Layout",
    "Proof",
    "Superblock",
    "decode_superblock",
    "parse_root_hash",
]
