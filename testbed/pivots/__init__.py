# SPDX-License-Identifier: Apache-2.0
"""Pivots of a real guest, with kills and failures at random steps."""
