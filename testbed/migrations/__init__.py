# SPDX-License-Identifier: Apache-2.0
"""Moves of a guest between two hosts of one machine: arranged, timed, and with faults."""
