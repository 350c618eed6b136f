# SPDX-License-Identifier: Apache-2.0
"""A guest's heartbeat: does it run, and for how long did it not?

A loop in the guest sends its number and the guest's uptime over a second serial port, a
hundred times a second; `Heartbeat` notes when each arrives. A migration moves the loop with the
guest, so that the time between its last beat at the source and its first one at the
destination is how long the guest was not heard of, wherever the time went.

Both ends have to have one clock, and it cannot be the guest's: that one stands still while
the guest is stopped, and shows of the pause as good as nothing (`Pause.guest`).
"""

from dataclasses import dataclass
from itertools import pairwise

import trio

# Nothing is ever written to that pipe: reading it is a sleep without another process.
LOOP = (
    "mkfifo /dev/never; (i=0; while :; do i=$((i+1)); read -t 0.01 x <&4; "
    "read up x </proc/uptime; echo $i $up; done) 4<>/dev/never >/dev/ttyS1 2>/dev/null &"
)
_POLL = 0.02
_PATIENCE = 60.0


@dataclass(frozen=True)
class Beat:
    """``number`` counts from 1; ``guest`` is its uptime, ``heard`` our time, both in seconds."""

    number: int
    guest: float
    heard: float


@dataclass(frozen=True)
class Pause:
    """Seconds from the last beat at the source to the first one at the destination:
    ``heard`` by our clock, ``guest`` by the guest's. ``usual`` is the longest time between
    two beats at the source: what there is without a migration."""

    heard: float
    guest: float
    usual: float


def serial_port(path: str) -> tuple[str, ...]:
    """QEMU arguments for the port, which is /dev/ttyS1 in the guest and a socket here."""
    chardev = f"socket,id=heartbeat,path={path},server=on,wait=off"
    return ("-chardev", chardev, "-device", "isa-serial,chardev=heartbeat,id=heartbeat,index=1")


class Heartbeat:
    """The beats of one guest, at the source (``here``) and the destination (``there``)."""

    def __init__(self) -> None:
        self.here: list[Beat] = []
        self.there: list[Beat] = []
        self._begun = b""
        self._changed = trio.lowlevel.ParkingLot()

    async def listen(self, here: str, there: str) -> None:
        """Note the beats that come from two sockets, until this is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, here, self.here)
            nursery.start_soon(self._listen, there, self.there)

    async def _listen(self, path: str, beats: list[Beat]) -> None:
        stream = await _connect(path)
        async with stream:
            while data := await _receive(stream):
                self._note(data, trio.current_time(), beats)

    def _note(self, data: bytes, now: float, beats: list[Beat]) -> None:
        # The guest may move in the middle of a line: its end comes from the other socket.
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            number, uptime = line.split()
            beats.append(Beat(int(number), float(uptime), now))
        self._changed.unpark_all()

    async def wait_here(self, beats: int) -> None:
        """Wait until the source's guest has sent so many. Raises TooSlowError."""
        with trio.fail_after(_PATIENCE):
            while len(self.here) < beats:
                await self._changed.park()

    async def wait_there(self) -> float:
        """Wait until the guest lives at the destination; when that was. Raises TooSlowError."""
        with trio.fail_after(_PATIENCE):
            while not self.there:
                await self._changed.park()
        return self.there[0].heard

    def pause(self) -> Pause:
        """What the migration cost. Raises ValueError if a beat was lost or repeated."""
        beats = [*self.here, *self.there]
        if [beat.number for beat in beats] != list(range(1, len(beats) + 1)):
            raise ValueError("the guest's beats are not what it sent")
        last, first = self.here[-1], self.there[0]
        usual = max(after.heard - before.heard for before, after in pairwise(self.here))
        return Pause(first.heard - last.heard, first.guest - last.guest, usual)


async def _connect(path: str) -> trio.SocketStream:
    while True:
        try:
            return await trio.open_unix_socket(path)
        except OSError:  # not yet there
            await trio.sleep(_POLL)


async def _receive(stream: trio.SocketStream) -> bytes:
    try:
        return bytes(await stream.receive_some())
    except trio.BrokenResourceError:
        return b""
