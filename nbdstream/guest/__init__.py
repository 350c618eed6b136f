# SPDX-License-Identifier: Apache-2.0
"""Guests: start QEMU, talk to it (QMP) and to what runs in it (the serial console)."""
