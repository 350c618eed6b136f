# SPDX-License-Identifier: Apache-2.0
"""The three ways of the demo and the benchmark each do what they are compared for."""

from pathlib import Path

import pytest
import trio

from testbed.guests import images
from testbed.link.model import Shape
from testbed.migrations.arrangement import Ends
from testbed.migrations.heartbeat import Beat, Heartbeat
from testbed.migrations.network import network
from testbed.migrations.ways import WAYS, MemoryOnly, Way, migrate

MIB = 1 << 20
FAST = Shape(rate=1e9, delay=0.001)


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
@pytest.mark.timeout(300)
async def test_a_guest_that_writes_moves(
    kind: type[Way], busybox_image: Path, busybox_disk: Path, tmp_path: Path
) -> None:
    size = busybox_disk.stat().st_size  # noqa: ASYNC240
    images.grow(busybox_disk, size + 64 * MIB, 16 * MIB)
    with network(tmp_path, FAST) as between:
        outcome = await migrate(kind(Ends(tmp_path, busybox_image), between, busybox_disk, print))
    assert 0 < outcome.pause < outcome.running
    assert outcome.heard.heard > 0
    assert outcome.memory > 16 * MIB
    assert outcome.acknowledged > 3
    if kind is MemoryOnly:
        assert outcome.disk == 0
    else:
        assert outcome.allocated <= outcome.disk < 1.5 * outcome.allocated


async def test_a_pulse_goes_on_in_the_middle_of_a_line(tmp_path: Path) -> None:
    heartbeat = await heard(tmp_path, b"1 5.00\r\n2 5.01\r\n3 5", b".02\r\n4 5.03\r\n")
    assert [beat.number for beat in heartbeat.here] == [1, 2]
    assert [(beat.number, beat.guest) for beat in heartbeat.there] == [(3, 5.02), (4, 5.03)]


async def test_a_lost_beat_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not what it sent"):
        (await heard(tmp_path, b"1 5.00\r\n2 5.01\r\n", b"4 5.03\r\n")).pause()


def test_a_pause_is_what_lies_between_the_ends() -> None:
    heartbeat = Heartbeat()
    heartbeat.here += [Beat(1, 5.00, 10.0), Beat(2, 5.02, 10.1), Beat(3, 5.03, 10.5)]
    heartbeat.there += [Beat(4, 5.05, 12.0), Beat(5, 5.06, 13.0)]
    pause = heartbeat.pause()
    assert (pause.heard, pause.usual) == pytest.approx((1.5, 0.4))
    assert pause.guest == pytest.approx(0.02)


async def heard(directory: Path, here: bytes, there: bytes) -> Heartbeat:
    """A heartbeat to which two sockets have said this, one after the other."""
    heartbeat = Heartbeat()
    async with trio.open_nursery() as nursery:
        one, other = (str(directory / name) for name in ("here", "there"))
        nursery.start_soon(heartbeat.listen, one, other)
        for path, beats in zip((one, other), (here, there), strict=True):
            with trio.socket.socket(trio.socket.AF_UNIX) as sock:
                await sock.bind(path)
                sock.listen()
                stream, _ = await sock.accept()
                with stream:
                    await stream.send(beats)
                    await (heartbeat.wait_there() if path == other else heartbeat.wait_here(2))
        nursery.cancel_scope.cancel()
    return heartbeat
