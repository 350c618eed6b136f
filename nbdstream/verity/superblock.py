# SPDX-License-Identifier: Apache-2.0
"""The superblock of a hash tree: how many blocks it covers, and how they are hashed.

Nothing in it is trusted. With wrong values the tree does not fit the root hash. So it is only
checked that the values are possible, and are supported here.

Source: "Verity superblock format" on cryptsetup's DMVerity page; all numbers are little-endian.
"""

import struct
from dataclasses import dataclass

from nbdstream.errors import VerificationError
from nbdstream.verity.hashes import DIGEST_LENGTHS, HashKind
from nbdstream.verity.layout import BLOCK

SUPERBLOCK_LENGTH = 512
MAGIC = b"verity\0\0"

# magic, version, hash type, UUID, algorithm, data block size, hash block size, data blocks,
# length of the salt, padding, salt, padding
_FIELDS = struct.Struct("<8s II 16s 32s II Q H 6x 256s 168x")
_VERSION = 1
_HASH_TYPE = 1  # 0 is the format of early Chromium OS
_SALT_MOST = 256
_BLOCKS_MOST = (1 << 63) // BLOCK


@dataclass(frozen=True)
class Superblock:
    """What a hash tree covers: ``blocks`` data blocks of `BLOCK` bytes, hashed as ``kind`` says."""

    blocks: int
    kind: HashKind

    @property
    def size(self) -> int:
        """Bytes of the image that the tree covers."""
        return self.blocks * BLOCK


def decode_superblock(data: bytes, name: str) -> Superblock:
    """Parse the first `SUPERBLOCK_LENGTH` bytes of a hash tree. ``name`` is for messages.

    Raises:
        VerificationError: they are no superblock, or one with values that are not supported.
    """
    if len(data) < SUPERBLOCK_LENGTH or not data.startswith(MAGIC):
        raise VerificationError(f"{name}: not a hash tree of veritysetup (no superblock)")
    fields = _FIELDS.unpack_from(data)
    _, version, hash_type, _, algorithm, data_block, hash_block, blocks, salt_length, salt = fields
    if version != _VERSION or hash_type != _HASH_TYPE:
        raise VerificationError(
            f"{name}: superblock version {version} with hash type {hash_type} is not supported: "
            f"make the tree with veritysetup format --format={_HASH_TYPE}"
        )
    if data_block != BLOCK or hash_block != BLOCK:
        raise VerificationError(
            f"{name}: data blocks of {data_block} and hash blocks of {hash_block} bytes are not "
            f"supported: make the tree with blocks of {BLOCK} bytes"
        )
    wanted = algorithm.rstrip(b"\0")
    known = next((each for each in DIGEST_LENGTHS if wanted == each.encode()), "")
    if not known:
        raise VerificationError(
            f"{name}: hash algorithm {wanted!r} is not supported: make the tree "
            f"with --hash={' or '.join(DIGEST_LENGTHS)}"
        )
    if salt_length > _SALT_MOST or not 0 < blocks <= _BLOCKS_MOST:
        raise VerificationError(
            f"{name}: the superblock is damaged: a salt of {salt_length} bytes, {blocks} blocks"
        )
    return Superblock(blocks, HashKind(known, salt[:salt_length]))
