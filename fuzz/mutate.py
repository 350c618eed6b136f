# SPDX-License-Identifier: Apache-2.0
"""Inputs changed at random: where atheris is not installed, and for fresh inputs in tests."""

import random
from collections.abc import Sequence

_WORDS = (
    b"\0" * 8,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\x80" + b"\0" * 7,
    b"\0\0\0\1",
    b"9" * 30,
    b"[" * 20,
    b"\xc3\x28",
    b"%00",
    b"\r\n\r\n",
)
KINDS = 8

# Where (modulo the length), in which of `KINDS` ways, with what.
Edit = tuple[int, int, bytes]


def edited(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The input with these changes made to it, one after the other."""
    new = bytearray(data)
    for place, kind, material in edits:
        at = place % (len(new) + 1)
        if kind == 0:
            new[at : at + len(material)] = b""
        elif kind == 1:
            new[at:at] = material
        elif kind == 2:
            new[at : at + len(material)] = material
        elif kind == 3:
            word = _WORDS[sum(material) % len(_WORDS)]
            new[at : at + len(word)] = word
        elif kind == 4:
            piece = new[at : at + 1 + sum(material) % 64]
            new[at:at] = piece * (1 + len(material))
        elif kind == 5:
            start = sum(material) % (len(new) + 1)
            new[at:] = new[start:]
        elif at < len(new) and material:
            new[at] = material[0] if kind == 6 else new[at] ^ 1 << material[0] % 8
    return bytes(new)


def mutated(chance: random.Random, stored: Sequence[bytes]) -> bytes:
    """One of the inputs, changed in one to eight places."""
    edits = [
        (chance.randrange(1 << 16), chance.randrange(KINDS), chance.randbytes(chance.randrange(8)))
        for _ in range(chance.randint(1, 8))
    ]
    return edited(chance.choice(stored), edits)
