# SPDX-License-Identifier: Apache-2.0
"""Post-copy block migration: the guest moves first, its disk follows.

``offer`` and ``standby`` are what a serving nbdstream does at either end, as commands on
its control socket; the other modules are the tool that has both ends agree. See
docs/migration.md for the protocol and for what each step protects from.
"""
