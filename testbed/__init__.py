# SPDX-License-Identifier: Apache-2.0
"""What `tests/`, `vm-tests/` and `benchmarks/` share: peers, far servers, an emulated link,
guests and their images, migrations. It imports only `nbdstream`.
"""
