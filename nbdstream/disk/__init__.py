# SPDX-License-Identifier: Apache-2.0
"""The streamed disk: a local leaf whose missing clusters come from a remote backing."""

from nbdstream.disk.changes import DetectZeroes
from nbdstream.disk.disk import StreamedDisk
from nbdstream.disk.opening import open_disk
from nbdstream.disk.populate import Unit
from nbdstream.disk.rounding import round_off

__all__ = ["DetectZeroes", "StreamedDisk", "Unit", "open_disk", "round_off"]
