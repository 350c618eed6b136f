# SPDX-License-Identifier: Apache-2.0
"""QMP, the QEMU Machine Protocol: its messages as a codec without I/O, and a client."""
