# SPDX-License-Identifier: Apache-2.0
"""Boot profiles that are published beside an image, for those who boot it for the first time.

Beside ``https://HOST/PATH`` that is the object ``https://HOST/PATH.nbdprofile``, likewise for S3;
beside the NBD export ``NAME`` it is the export ``NAME.nbdprofile`` of the same server. Most images
have none, so its absence costs nothing but a connection, and no request waits for it.

The server of the image can put anything there. It is read up to a small size, parsed like any
other profile, and used only if it is of this image.
"""

import logging
from dataclasses import replace
from urllib.parse import urlsplit

import trio

from nbdstream.backing import open_backing
from nbdstream.backing.base import Priority
from nbdstream.backing.sources import chain, recorded_by_image
from nbdstream.errors import TROUBLE, ProfileError, sole_error
from nbdstream.net.address import NbdUri, is_nbd_uri
from nbdstream.streamer.profile import MAGIC, Profile, decode_profile, require_of
from nbdstream.text import redacted

log = logging.getLogger(__name__)

SUFFIX = ".nbdprofile"
BYTES_MOST = 1 << 20
SECONDS_MOST = 30.0
_OBJECT_SCHEMES = ("http", "https", "s3")


def published_uri(uri: str) -> str | None:
    """Where the profile of a backing would be; None where that is not defined."""
    if len(chain(uri)) > 1:
        return None
    image = recorded_by_image(uri)[0]
    if is_nbd_uri(image):
        address = NbdUri.parse(image)
        return str(replace(address, export=address.export + SUFFIX))
    parts = urlsplit(image)
    if parts.scheme not in _OBJECT_SCHEMES:
        return None
    return parts._replace(path=parts.path + SUFFIX).geturl()


async def fetch_published(uri: str, identity: str, size: int) -> Profile | None:
    """The profile that is published beside the backing ``uri``, if there is one and it is of
    this image. What is wrong with it is logged."""
    where = published_uri(uri)
    if where is None:
        return None
    data = b""
    with trio.move_on_after(SECONDS_MOST):
        try:
            data = await _read(where, unless_size=size)
        except Exception as error:
            failure = sole_error(error)
            if not isinstance(failure, TROUBLE):
                raise
            log.debug("no boot profile is published: %s", failure)
    # Some servers serve the image under any name: that is no profile, and no trouble.
    if not data.startswith(MAGIC.encode()):
        return None
    try:
        # Some servers round an export's size up.
        found = decode_profile(data.rstrip(b"\0"), redacted(where))
        require_of(found, identity, size, redacted(where))
    except ProfileError as error:
        log.warning("the published boot profile is ignored: %s", error)
        return None
    return found


async def _read(uri: str, *, unless_size: int) -> bytes:
    """All of a small export; nothing of one that is too large, or as large as the image.

    Raises NbdstreamError, OSError, or a group of them.
    """
    async with open_backing(uri, timeout=SECONDS_MOST) as backing:
        if backing.size > BYTES_MOST or backing.size == unless_size:
            return b""
        data = bytearray(backing.size)
        await backing.read(memoryview(data), 0, Priority.DEMAND)
        return bytes(data)
