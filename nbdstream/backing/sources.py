# SPDX-License-Identifier: Apache-2.0
"""From what a user writes after ``-b`` to an open backing."""

import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from nbdstream.backing.nbd import NbdBacking, open_nbd
from nbdstream.errors import UsageError

NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")


@contextlib.asynccontextmanager
async def open_backing(
    uri: str,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
    size: int = 0,
    identity: str = "",
) -> AsyncIterator[NbdBacking]:
    """Open the backing that a URI names; it is closed at the end of the block.

    ``timeout``: seconds for which reads wait for a lost backing; None is for ever.
    ``size`` and ``identity`` (see `nbdstream.backing.identity`), where known: what it has
    to be. With both of them a backing that is out of reach is no error: it opens
    disconnected, and its reads wait.

    Raises:
        UsageError: not a URI of a kind that is known.
        BackingGoneError: nothing answers there.
        BackingMismatchError: not of that size or identity.
        BackingError: anything else that is wrong, in one line.
    """
    scheme = urlsplit(uri).scheme
    if scheme not in NBD_SCHEMES:
        raise UsageError(f"{uri}: unknown scheme; known: {', '.join(NBD_SCHEMES)}")
    async with open_nbd(uri, uri, timeout=timeout, size=size, identity=identity) as backing:
        yield backing
