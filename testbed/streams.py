# SPDX-License-Identifier: Apache-2.0
"""Reading from a stream what a protocol says is to come."""

import trio


async def receive_exactly(stream: trio.SocketStream, count: int) -> bytes:
    """So many bytes. Raises trio.BrokenResourceError if the other end closes before."""
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise trio.BrokenResourceError
        data += more
    return data
