# SPDX-License-Identifier: Apache-2.0
"""Tests of nbdstream against real peers; `testbed.peers` starts these peers."""
