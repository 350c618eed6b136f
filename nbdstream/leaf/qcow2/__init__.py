# SPDX-License-Identifier: Apache-2.0
"""qcow2 images, read and written from the specification.

header      the header, and how it is rewritten
layout      sizes, L1 and L2 entries
entries     whether L2 entries lead to where data may be
tables      the L1 table and the cache of L2 slices
space       free space; refcount changes to come
refcounts   refcounts in the file
changes     writing and zeroing
compressed  reading compressed clusters
leaf        the leaf; what is durable when
references  who refers to which cluster: the whole image, counted
check       check, repair, rebuild after a crash
opening     what is done to an image before it is written to
create      new images
"""

from nbdstream.leaf.qcow2.create import create
from nbdstream.leaf.qcow2.opening import open_image

__all__ = ["create", "open_image"]
