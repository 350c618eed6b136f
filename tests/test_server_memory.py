# SPDX-License-Identifier: Apache-2.0
"""The memory of a real server under clients that want all of it, against what docs/security.md
promises."""

import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import trio

from nbdstream.server.constants import GREETING, MAX_PAYLOAD, Command, Option
from testbed.peers import make_image, nbdkit, nbdstream_serve
from testbed.processes import resident_bytes
from tests.server_support import RawClient, option, request

MIB = 1 << 20
SIZE = 64 * MIB
HOGS = 24
# A client that could not send anything for so long is held back by the server.
STUCK_SECONDS = 0.5
# docs/security.md, "Memory": all clients together, each of them, two buffers of a connection.
PROMISED = 256 * MIB + HOGS * int((1 + 2.4) * MIB)
# What the objects of requests take, and pages that are free and not given back.
SLACK = 64 * MIB


async def send_until_stuck(client: RawClient, data: Callable[[int], bytes], most: int) -> None:
    """Send one piece after the other, as long as the server takes them, or hangs up."""
    with trio.CancelScope() as patience, suppress(trio.BrokenResourceError):
        for number in range(most):
            patience.deadline = trio.current_time() + STUCK_SECONDS
            await client.send(data(number))


async def writes_that_never_end(client: RawClient) -> None:
    await client.go(structured=False)
    await client.send(request(Command.WRITE, 0, MAX_PAYLOAD))
    await send_until_stuck(client, lambda _: bytes(MIB), MAX_PAYLOAD // MIB - 1)


async def reads_that_wait_for_the_backing(client: RawClient) -> None:
    await client.go(structured=False)
    numbers = count(1)
    await send_until_stuck(
        client, lambda _: request(Command.READ, 32 * MIB, MIB, cookie=next(numbers)), 1000
    )


async def replies_that_are_not_taken(client: RawClient) -> None:
    await client.go()
    await send_until_stuck(client, lambda _: request(Command.READ, 0, MAX_PAYLOAD) * 100, 100)


async def block_status_that_is_not_taken(client: RawClient) -> None:
    await client.go(contexts=[b"base:allocation"])
    await send_until_stuck(client, lambda _: request(Command.BLOCK_STATUS, 0, SIZE) * 1000, 100)


async def options_without_end(client: RawClient) -> None:
    await client.take(GREETING.size)
    await client.send((3).to_bytes(4, "big"))
    await send_until_stuck(client, lambda _: option(Option.GO, bytes(1 << 20)), 40)


async def names_that_do_not_come(client: RawClient) -> None:
    await client.take(GREETING.size)
    head = option(Option.EXPORT_NAME)[:-4] + (0xFFFFFFFF).to_bytes(4, "big")
    await client.send((3).to_bytes(4, "big") + head)
    await send_until_stuck(client, lambda _: bytes(MIB), 40)


@pytest.mark.parametrize(
    "attack",
    [
        writes_that_never_end,
        reads_that_wait_for_the_backing,
        replies_that_are_not_taken,
        block_status_that_is_not_taken,
        options_without_end,
        names_that_do_not_come,
    ],
)
async def test_memory_stays_within_what_is_promised(
    tmp_path: Path, attack: Callable[[RawClient], Awaitable[None]]
) -> None:
    """The backing is silent as well. A guest that came before is served all the while."""
    image = tmp_path / "image"
    make_image(image, SIZE, sparse=False)
    with (
        nbdkit("file", image, readonly=True) as far,
        nbdstream_serve(tmp_path / "leaf.raw", far.uri, "--stream", "off") as server,
    ):
        assert server.socket
        guest = await RawClient.connect(server.socket)
        await guest.go(structured=False)
        await guest.send(request(Command.READ, 0, MAX_PAYLOAD))  # from now on this half is local
        await guest.reply(MAX_PAYLOAD)
        far.process.send_signal(signal.SIGSTOP)
        before = resident_bytes(server.pid, peak=True)

        async def hog() -> None:
            client = await RawClient.connect(server.socket)
            hogs.append(client)
            await attack(client)

        hogs: list[RawClient] = []
        try:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for _ in range(HOGS):
                        nursery.start_soon(hog)
                await guest.send(request(Command.READ, 4096, 4096, cookie=2))
                assert (await guest.reply(4096))[:2] == (2, 0)
        finally:
            far.process.send_signal(signal.SIGCONT)
            for client in [*hogs, guest]:
                await client.aclose()
        assert resident_bytes(server.pid, peak=True) - before < PROMISED + SLACK
