# SPDX-License-Identifier: Apache-2.0
"""The streamed disk: a local leaf whose missing clusters come from a remote backing."""

from nbdstream.disk.disk import DetectZeroes, StreamedDisk, open_disk

__all__ = ["DetectZeroes", "StreamedDisk", "open_disk"]
