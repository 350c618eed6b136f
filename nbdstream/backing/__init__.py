# SPDX-License-Identifier: Apache-2.0
"""The backing room: how a remote image is read, fast, fairly, and in spite of trouble."""

from nbdstream.backing.base import Backing, BackingStatistics, Priority
from nbdstream.backing.identity import fingerprint
from nbdstream.backing.sources import (
    BackingOpener,
    named_by_image,
    open_backing,
    recorded_by_image,
    runs_program,
)

__all__ = [
    "Backing",
    "BackingOpener",
    "BackingStatistics",
    "Priority",
    "fingerprint",
    "named_by_image",
    "open_backing",
    "recorded_by_image",
    "runs_program",
]
