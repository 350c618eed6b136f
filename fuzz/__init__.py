# SPDX-License-Identifier: Apache-2.0
"""Fuzzing: hostile bytes for everything that reads bytes from outside; see README.md.

A target is a module of `fuzz.targets`. `fuzz.target` has the rules that hold for all of
them, ``python -m fuzz`` runs them, tests/test_fuzz.py replays the corpus.
"""
