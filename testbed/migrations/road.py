# SPDX-License-Identifier: Apache-2.0
"""What lies between the two hosts of a migration, and what was sent over it.

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
class Door:
    """Where somebody listens, and where the other host finds that: HOST:PORT or unix:PATH."""

    listen: str
    reach: str


@dataclass(frozen=True)
class Road:
    """``what`` describes it; ``here`` and ``there`` are put before what runs at either end.
    ``memory`` and ``target`` (of a mirror) are doors at the destination, ``offer`` (of a disk)
    is one at the source. ``moved`` returns the bytes that went over the road so far, both
    ways: of memory, of disks."""

    what: str
    here: tuple[str, ...]
    there: tuple[str, ...]
    memory: Door
    target: Door
    offer: Door
    moved: Callable[[], tuple[int, int]]


@contextmanager
def road(directory: Path, shape: Shape) -> Iterator[Road]:
    """A road of this shape, with its sockets, if any, in ``directory``. Raises OSError."""
    with _emulated(directory, shape) if wire.missing() else _namespaces(shape) as made:
        yield made


@contextmanager
def _namespaces(shape: Shape) -> Iterator[Road]:
    with wire.wire(shape) as joined:

        def moved() -> tuple[int, int]:
            return joined.moved(MEMORY_PORT), joined.moved(DISK_PORT)

        memory, target = (
            Door(address, address)
            for address in (f"{wire.THERE}:{MEMORY_PORT}", f"{wire.THERE}:{DISK_PORT}")
        )
        offer = f"{wire.HERE}:{DISK_PORT}"
        what = "two network namespaces, one wire between them"
        yield Road(what, joined.here, joined.there, memory, target, Door(offer, offer), moved)


@contextmanager
def _emulated(directory: Path, shape: Shape) -> Iterator[Road]:
    sockets = [f"unix:{directory / name}" for name in ("memory", "offer")]
    with (
        link_process("127.0.0.1:0", sockets[0], shape) as memory,
        link_process("127.0.0.1:0", sockets[1], shape) as disk,
    ):
        doors = [
            Door(listen, str(link.address))
            for listen, link in zip(sockets, (memory, disk), strict=True)
        ]
        what = f"no namespaces ({wire.missing()}), an emulated link each for memory and disk"
        yield Road(what, (), (), doors[0], doors[1], doors[1], lambda: (_sent(memory), _sent(disk)))


def _sent(link: LinkProcess) -> int:
    return sum(int(link.stats()[way]["bytes"]) for way in ("up", "down"))
