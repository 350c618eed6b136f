# SPDX-License-Identifier: Apache-2.0
"""Fault injection: one fault at each point of a scenario in turn, and what must hold after it.

`python -m testbed.faults` runs every point; `--help` says how to run some of them, or one.
"""
