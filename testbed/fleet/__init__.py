# SPDX-License-Identifier: Apache-2.0
"""A fleet on one machine: an origin, racks with a cache each, and hosts, in network namespaces."""
