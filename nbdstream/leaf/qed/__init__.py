# SPDX-License-Identifier: Apache-2.0
"""QED images, read and written from the specification.

header  the header, and what is kept behind it
tables  L1 and L2 tables
leaf    the leaf; what is durable when
check   check and repair
create  new images
"""

from nbdstream.leaf.qed.create import create
from nbdstream.leaf.qed.leaf import open_image

__all__ = ["create", "open_image"]
