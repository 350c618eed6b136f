# SPDX-License-Identifier: Apache-2.0
"""Raw images, with an allocation map while they have a backing.

map    the allocation map
leaf   the leaf; what is durable when; new images
names  removing the map by the name that it has
"""

from nbdstream.leaf.raw.leaf import create, open_image

__all__ = ["create", "open_image"]
