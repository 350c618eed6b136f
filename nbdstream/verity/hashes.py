# SPDX-License-Identifier: Apache-2.0
"""Hashes of blocks, and root hashes as text."""

import hashlib
import re
from dataclasses import dataclass

from nbdstream.errors import UsageError

# The algorithms that are supported, with the length of a digest in bytes.
DIGEST_LENGTHS = {"sha256": 32, "sha512": 64}


@dataclass(frozen=True)
class HashKind:
    """How a tree hashes a block, data and tree blocks alike: ``algorithm`` over ``salt`` and then
    the block (hash type 1 of the format)."""

    algorithm: str
    salt: bytes

    @property
    def length(self) -> int:
        """Bytes of a digest."""
        return DIGEST_LENGTHS[self.algorithm]

    def digests(self, data: memoryview, block: int) -> list[bytes]:
        """The digest of each block of ``block`` bytes. Safe in a worker; hashlib releases the
        GIL for blocks of this size."""
        salted = hashlib.new(self.algorithm, self.salt)
        found = []
        for start in range(0, len(data), block):
            # Cheaper than hashing the salt again for each block.
            digest = salted.copy()
            digest.update(data[start : start + block])
            found.append(digest.digest())
        return found


def parse_root_hash(text: str) -> bytes:
    """A root hash as ``veritysetup format`` prints it, hexadecimal digits in either case.

    Raises:
        UsageError: it is not one.
    """
    lengths = {2 * length for length in DIGEST_LENGTHS.values()}
    if len(text) not in lengths or not re.fullmatch("[0-9a-fA-F]+", text):
        raise UsageError(
            f"'{text[:140]}' is not a root hash: give the 64 (sha256) or 128 (sha512) hexadecimal "
            "digits that veritysetup format prints"
        )
    return bytes.fromhex(text)
