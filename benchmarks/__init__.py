# SPDX-License-Identifier: Apache-2.0
"""Side-by-side measurements of nbdstream and its peers, and the link they are taken over.

`python -m benchmarks NAME ...` runs them; each prints one table.
"""
