# SPDX-License-Identifier: Apache-2.0
"""A slow wire between two network namespaces, for all that passes between them.

One process copies IP packets between two tun devices, one in each namespace. What a packet
meets on its way is `testbed.link.model`'s: one FIFO queue in each direction, a rate, a
delay; a packet that finds the queue full is lost, as in a router, so that the kernels' TCP
finds out what the wire carries. It needs root; the kernel needs neither netem nor tbf.

Packets are as large as what a link of 200 Mbit/s sends in a millisecond, which spares the
processor: guests need it more. The rate counts whole packets, `moved` only TCP's payload.
"""

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from testbed.link.model import Direction, Lane, LinkClock, Shape
from testbed.processes import python_environment

MTU = 24000
# What waits when the queue is full takes so long to be sent.
QUEUE_SECONDS = 0.05
HERE, THERE = "10.0.0.1", "10.0.0.2"

# From <linux/if_tun.h>: packets as they are, without a header of the device's own.
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_TCP = 6


class Way:
    """One direction: packets out of one device into the other."""

    def __init__(self, source: int, sink: int, shape: Shape) -> None:
        self.source, self._sink = source, sink
        self._direction = Direction(shape)
        self._lane = Lane([])
        self.moved: Counter[int] = Counter()

    def step(self, now: float) -> None:
        """Take what has come, send what is due."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(self.source, MTU)
                if self._direction.has_room:
                    self._direction.arrive(now, self._lane, memoryview(packet))
                    self.moved.update(payload(packet))
        self._direction.advance(now)
        in_flight = self._lane.in_flight
        while in_flight and in_flight[0].due <= now:
            data = in_flight.popleft().data
            with contextlib.suppress(OSError):  # the other end is down: lost
                os.write(self._sink, data or b"")

    def next_turn(self) -> float | None:
        """When there is something to do, if no packet comes before."""
        in_flight = self._lane.in_flight
        turns = self._direction.next_turn(), in_flight[0].due if in_flight else None
        return min((turn for turn in turns if turn is not None), default=None)


def payload(packet: bytes) -> dict[int, int]:
    """Bytes of TCP's payload in an IPv4 packet, for both of its ports."""
    if packet[0] >> 4 != 4 or packet[9] != _TCP:
        return {}
    header = (packet[0] & 15) * 4
    (total,) = struct.unpack_from(">H", packet, 2)
    length = total - header - (packet[header + 12] >> 4) * 4
    return dict.fromkeys(struct.unpack_from(">HH", packet, header), length)


def _open_tun() -> tuple[int, str]:
    """A new tun device, which lasts as long as it is open, and its name."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH22x", b"", _IFF_TUN | _IFF_NO_PI)
    answer = fcntl.ioctl(fd, _TUNSETIFF, request)
    return fd, answer[:16].rstrip(b"\0").decode()


def main() -> None:
    """Print the names of two devices, then be the wire between them; each line on standard
    input is answered with the bytes moved, by TCP port."""
    parser = argparse.ArgumentParser(description="Be a wire between two tun devices.")
    parser.add_argument("--rate", type=float, required=True, help="bits per second, each way")
    parser.add_argument("--delay", type=float, required=True, help="seconds, one way")
    parser.add_argument("--queue", type=int, required=True, help="bytes, each way")
    arguments = parser.parse_args()
    shape = Shape(rate=arguments.rate, delay=arguments.delay, queue=arguments.queue)
    (here, here_name), (there, there_name) = _open_tun(), _open_tun()
    ways = Way(here, there, shape), Way(there, here, shape)
    print(json.dumps([here_name, there_name]), flush=True)
    threading.Thread(target=_answer, args=(ways,), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    clock = LinkClock()
    while True:
        now = clock.now()
        for way in ways:
            way.step(now)
        turns = [turn for way in ways if (turn := way.next_turn()) is not None]
        wait = max(0.0, min(turns) - clock.now()) if turns else None
        select.select([way.source for way in ways], [], [], wait)


def _answer(ways: tuple[Way, Way]) -> None:
    for _line in sys.stdin:
        # Copies, in one step each: the other thread goes on counting.
        here, there = (Counter(dict(way.moved)) for way in ways)
        print(json.dumps(here + there), flush=True)


# -- for those who use it ----------------------------------------------------------------


@dataclass(frozen=True)
class Wire:
    """Two namespaces, with the addresses `HERE` and `THERE`, and what joins them. ``here`` and
    ``there`` are put before a command to run it in one of them."""

    here: tuple[str, ...]
    there: tuple[str, ...]
    process: subprocess.Popen[str]

    def moved(self, port: int) -> int:
        """Bytes that went over the wire so far, both ways, on connections to this port."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        counts: dict[str, int] = json.loads(self.process.stdout.readline())
        return counts.get(str(port), 0)


def missing() -> str:
    """Why there can be no wire on this machine; "" if there can."""
    if os.geteuid() != 0:
        return "not root"
    return "" if Path("/dev/net/tun").exists() else "the kernel has no tun devices"


@contextlib.contextmanager
def wire(shape: Shape) -> Iterator[Wire]:
    """Two namespaces joined by a wire of this shape; gone with the block.

    Raises OSError, CalledProcessError.
    """
    assert shape.rate is not None
    shape = replace(shape, queue=int(shape.rate / 8 * QUEUE_SECONDS))
    names = [f"nbdstream-{os.getpid()}-{end}" for end in ("here", "there")]
    command = [sys.executable, "-m", "testbed.link.wire", "--rate", str(shape.rate)]
    command += ["--delay", str(shape.delay), "--queue", str(shape.queue)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=python_environment(),
            )
        )
        stack.callback(process.terminate)
        assert process.stdout
        devices = json.loads(process.stdout.readline() or "[]")
        if not devices:
            raise OSError(f"{command} ended with status {process.wait()}")
        ends = zip(names, devices, (HERE, THERE), (THERE, HERE), strict=True)
        for name, device, address, peer in ends:
            _ip("link", "set", device, "netns", name)
            inside = ("-n", name)
            _ip(*inside, "address", "add", address, "peer", peer, "dev", device)
            _ip(*inside, "link", "set", device, "mtu", str(MTU), "up")
            _ip(*inside, "link", "set", "lo", "up")
            # What most machines have; others' default paces, and probes with pauses.
            _ip(*inside, "route", "replace", peer, "dev", device, "congctl", "cubic")
        here, there = (("ip", "netns", "exec", name) for name in names)
        yield Wire(here, there, process)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    main()
