# SPDX-License-Identifier: Apache-2.0
"""Generations: the names of content that is handed over.

A generation is a random token, made for one offer of a disk. The content is offered under
``DEVICE@GENERATION`` and under no other name, so that a destination which depends on one
generation can never connect to another, whatever else the two have in common.
"""

import re
import secrets

from nbdstream.errors import BackingMismatchError, UsageError
from nbdstream.net.address import NbdUri

# What a leaf records in place of its backing's identity while it stands by: it is not a disk
# yet, because the backing may still be written (`nbdstream.handover.standby`).
STANDBY = "standby"

_GENERATION = re.compile(r"@([0-9a-f]{16})$")


def new_generation() -> str:
    """A token that no other hand-over has."""
    return secrets.token_hex(8)


def export_name(device: str, generation: str) -> str:
    """The name under which a generation of a device's content is offered."""
    return f"{device}@{generation}"


def generation_of(uri: str) -> str:
    """The generation that an NBD URI names, or "" where it names none."""
    try:
        named = _GENERATION.search(NbdUri.parse(uri).export)
    except UsageError:
        return ""
    return named[1] if named else ""


def check_generation(known: str, uri: str) -> None:
    """A leaf that was handed a generation of its source stays with it: ``known`` is the backing
    that it names, ``uri`` another place of that. Raises BackingMismatchError."""
    if generation_of(known) != generation_of(uri):
        raise BackingMismatchError(
            f"{uri}: not generation {generation_of(known) or 'known'} of the source's disk, "
            f"which the leaf belongs to ({known})"
        )
