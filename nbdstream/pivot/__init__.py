# SPDX-License-Identifier: Apache-2.0
"""Pivot: the QEMU of a running guest opens the leaf itself, and the server ends."""
