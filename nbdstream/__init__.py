# SPDX-License-Identifier: Apache-2.0
"""nbdstream: boot virtual machines at once from disk images that live far away."""

__version__ = "0.1.0"
