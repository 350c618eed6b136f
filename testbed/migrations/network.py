# SPDX-License-Identifier: Apache-2.0
"""The network between the two hosts of a migration, and what was sent over it.

As root the hosts are network namespaces, and one wire carries it all (`wire`): memory and
disk share its queue, both kernels' TCP is at work. Without root both hosts are this machine,
and memory and disk have an emulated link (`testbed.link.proxy`) each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed.link import wire
from testbed.link.control import LinkProcess, link_process
from testbed.link.model import Shape

MEMORY_PORT, DISK_PORT = 4444, 10809


@dataclass(frozen=True)
class Endpoint:
    """Where to listen, and how the other host reaches that: HOST:PORT or unix:PATH."""

    listen: str
    reach: str


@dataclass(frozen=True)
class Network:
    """``what`` describes it; ``here`` and ``there`` are put before what runs at either end.
    ``memory`` and ``target`` (of a mirror) are endpoints at the destination, ``offer`` (of a disk)
    is one at the source. ``moved`` returns the bytes that went over the network so far, both
    ways: of memory, of disks."""

    what: str
    here: tuple[str, ...]
    there: tuple[str, ...]
    memory: Endpoint
    target: Endpoint
    offer: Endpoint
    moved: Callable[[], tuple[int, int]]


@contextmanager
def network(directory: Path, shape: Shape) -> Iterator[Network]:
    """A network of this shape; sockets, if it has any, are in ``directory``. Raises OSError."""
    with _emulated(directory, shape) if wire.missing() else _namespaces(shape) as made:
        yield made


@contextmanager
def _namespaces(shape: Shape) -> Iterator[Network]:
    with wire.wire(shape) as joined:

        def moved() -> tuple[int, int]:
            return joined.moved(MEMORY_PORT), joined.moved(DISK_PORT)

        memory, target = (
            Endpoint(address, address)
            for address in (f"{wire.THERE}:{MEMORY_PORT}", f"{wire.THERE}:{DISK_PORT}")
        )
        offer = f"{wire.HERE}:{DISK_PORT}"
        what = "two network namespaces, one wire between them"
        yield Network(
            what, joined.here, joined.there, memory, target, Endpoint(offer, offer), moved
        )


@contextmanager
def _emulated(directory: Path, shape: Shape) -> Iterator[Network]:
    sockets = [f"unix:{directory / name}" for name in ("memory", "offer")]
    with (
        link_process("127.0.0.1:0", sockets[0], shape) as memory,
        link_process("127.0.0.1:0", sockets[1], shape) as disk,
    ):
        memory_end, disk_end = (
            Endpoint(listen, str(link.address))
            for listen, link in zip(sockets, (memory, disk), strict=True)
        )
        what = f"no namespaces ({wire.missing()}), an emulated link each for memory and disk"
        yield Network(
            what, (), (), memory_end, disk_end, disk_end, lambda: (_sent(memory), _sent(disk))
        )


def _sent(link: LinkProcess) -> int:
    return sum(int(link.stats()[way]["bytes"]) for way in ("up", "down"))
