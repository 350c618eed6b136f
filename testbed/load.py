# SPDX-License-Identifier: Apache-2.0
"""A server under mixed load for a long time: does it grow?

    python -m testbed.load MINUTES

Serves a qcow2 leaf of a large remote image. Each round is half a minute of everything at once:
guests that read and write, the stream job, a crowd of bad clients, commands and noise on the
control socket, scrapes of the metrics, and a backing that is killed and comes back. Then the
clients leave, the job pauses, and what the server still holds is counted: memory, descriptors,
threads, trio tasks, Python objects. From a sixth of the time on none of it may grow.

Prints a line for each round. Exit status 1 if something grew, if a guest's data was wrong, or if
the server wrote a traceback.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median

import trio

from testbed import crowd
from testbed.peers import (
    Peer,
    PeerError,
    Qmp,
    binary,
    nbdkit,
    nbdstream_serve,
    run,
    temporary_directory,
    unix_uri,
)
from testbed.processes import python_environment, resident_bytes
from testbed.remotes import free_port

MIB = 1 << 20
SIZE = 16 << 30
SPEED = "1M"  # of the stream job: it shall have work to the end
WRITTEN = 256 * MIB  # what the writing guest writes again and again
ROUND = 30.0  # seconds of load
STOP_SECONDS = 120.0  # it makes clusters whole first, for up to 20 s
SETTLE = 15.0  # seconds that the server may take to let go of a round
# What memory may differ by from one quiet moment to another without being growth.
SLACK_BYTES, SLACK_OBJECTS = 12 * MIB, 2000
DEAF, SLOW, DROPPED, AT_ONCE, NOISE = 8, 60, 500, 300, 40


@dataclass(frozen=True)
class Held:
    """What the server holds at a quiet moment."""

    resident: int
    descriptors: int
    threads: int
    tasks: int
    objects: int


@dataclass
class _Backing:
    """A slow remote image that can be killed and comes back at the same address."""

    path: Path
    stack: ExitStack

    @property
    def uri(self) -> str:
        return unix_uri(self.path)

    def start(self) -> None:
        self.peer = self.stack.enter_context(
            nbdkit(
                "pattern", f"size={SIZE}", "rdelay=20ms", filters=["delay"], socket_path=self.path
            )
        )

    async def fall(self) -> None:
        """Die in the middle of the round, and be back five seconds later."""
        await trio.sleep(ROUND / 3)
        self.peer.kill()
        await trio.sleep(5)
        self.start()  # here: nbdkit ends with the thread that starts it


@dataclass
class Arrangement:
    """The server, its backing, and the port of its metrics."""

    server: Peer
    backing: _Backing
    report: Path
    metrics: tuple[str, int]

    def held(self) -> Held:
        """Look at the server once."""
        self.report.unlink(missing_ok=True)
        os.kill(self.server.pid, signal.SIGUSR1)
        self.server.wait_until(self.report.exists, "report", SETTLE)
        found, process = json.loads(self.report.read_text()), Path(f"/proc/{self.server.pid}")
        return Held(
            resident_bytes(self.server.pid),
            len(list((process / "fd").iterdir())),
            len(list((process / "task").iterdir())),
            found["tasks"],
            found["objects"],
        )


# --- the load ---------------------------------------------------------------------------


async def _guest(path: Path) -> None:
    await crowd.guest(path, ROUND)


async def _writer(uri: str) -> None:
    """A guest that writes, and reads what it wrote: fio compares checksums."""
    job = ["--name=writer", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--iodepth=8"]
    job += ["--bsrange=4k-256k", "--blockalign=4k", f"--size={WRITTEN}", "--offset=1g"]
    job += ["--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--rate_iops=100"]
    job += ["--time_based", f"--runtime={ROUND - 4}s", "--output-format=terse"]
    done = await trio.run_process(
        [binary("FIO"), *job], capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode != 0:
        raise PeerError(f"fio: {done.stdout.decode()}{done.stderr.decode()}")


async def _reader(uri: str) -> None:
    """A guest that reads what is remote, trims, zeroes and flushes; the pattern says whether
    what it read is right."""

    def read() -> None:
        import nbd

        handle, numbers, end = nbd.NBD(), random.Random(), time.monotonic() + ROUND - 4
        handle.add_meta_context("base:allocation")
        handle.connect_uri(uri)
        while time.monotonic() < end:
            offset = numbers.randrange(4 << 30, SIZE - MIB, 4096)
            data = handle.pread(numbers.choice([4096, 65536, MIB]), offset)
            if data[:8] != offset.to_bytes(8, "big"):
                raise PeerError(f"at {offset} there was {data[:8]!r}")
            spent = numbers.randrange(2 << 30, 3 << 30, 4096)
            numbers.choice([handle.trim, handle.zero])(65536, spent)
            handle.block_status(MIB, offset, lambda *_: 0)
            handle.flush()
            time.sleep(0.01)
        handle.shutdown()

    await trio.to_thread.run_sync(read, abandon_on_cancel=True)


async def _crowd(path: Path) -> None:
    await trio.sleep(3)  # guests come first: there is no room for so many
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crowd.deaf, path, DEAF)
        nursery.start_soon(crowd.slow, path, SLOW)
        while True:
            await crowd.drop(path, DROPPED)
            await crowd.together(path, AT_ONCE)
            await crowd.garbage(path, NOISE)


async def _control(path: Path) -> None:
    """Commands in connections of their own, some cut off, some that make no sense."""

    def command() -> None:
        with suppress(OSError), Qmp(path) as qmp:
            qmp.execute("x-nbdstream-stats")
            qmp.execute("x-nbdstream-map", limit=512)
            with suppress(PeerError):
                qmp.execute("block-job-pause", device=random.randbytes(40).hex())

    def noise() -> None:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(random.choice([random.randbytes(4096), b'{"execute":', b"[" * 4096]))

    while True:
        await trio.to_thread.run_sync(command)
        await trio.to_thread.run_sync(noise)
        await trio.sleep(0.05)


async def _scrapes(metrics: tuple[str, int]) -> None:
    """Scrapes, and requests that are none."""
    while True:
        with suppress(OSError):
            async with await trio.open_tcp_stream(*metrics) as stream:
                words = random.choice([b"GET /metrics HTTP/1.0\r\n\r\n", random.randbytes(512)])
                await stream.send_all(words)
                async for _ in stream:
                    pass
        await trio.sleep(0.2)


async def _round(arranged: Arrangement) -> None:
    """Half a minute of everything. Raises PeerError if a guest's data was wrong."""
    server = arranged.server
    assert server.control is not None
    async with trio.open_nursery() as rude:
        rude.start_soon(_crowd, server.socket)
        rude.start_soon(_control, server.control)
        rude.start_soon(_scrapes, arranged.metrics)
        async with trio.open_nursery() as guests:
            guests.start_soon(arranged.backing.fall)
            guests.start_soon(_guest, server.socket)
            guests.start_soon(_writer, server.uri)
            guests.start_soon(_reader, server.uri)
        rude.cancel_scope.cancel()


async def _settled(arranged: Arrangement, least: Held | None) -> Held:
    """What the server holds once it has let go of the round: no more than `least`, or, after
    `SETTLE` seconds, whatever there is."""
    assert arranged.server.control is not None
    with Qmp(arranged.server.control) as qmp:
        qmp.execute("block-job-pause", device="disk0")
        deadline = trio.current_time() + SETTLE
        while True:
            await trio.sleep(1)
            held = arranged.held()
            counted = held.descriptors, held.threads, held.tasks
            if trio.current_time() > deadline or (
                least and counted <= (least.descriptors, least.threads, least.tasks)
            ):
                break
        qmp.execute("block-job-resume", device="disk0")
    return held


def grown(history: list[tuple[float, Held]]) -> list[str]:
    """What grew from a sixth of the time on, in words. `history`: minutes, and what was held."""
    later = [held for minutes, held in history if minutes >= history[-1][0] / 6]
    quarter = max(1, len(later) // 4)
    slack = {"resident": SLACK_BYTES, "objects": SLACK_OBJECTS}
    found = []
    for each in fields(Held):
        values = [getattr(held, each.name) for held in later]
        first, last = median(values[:quarter]), median(values[-quarter:])
        if last > first + slack.get(each.name, 0):
            found.append(f"{each.name} grew from {first:g} to {last:g}: {values}")
    return found


async def _load(arranged: Arrangement, minutes: float) -> list[tuple[float, Held]]:
    history: list[tuple[float, Held]] = []
    began = trio.current_time()
    while trio.current_time() - began < minutes * 60:
        await _round(arranged)
        held = await _settled(arranged, history[-1][1] if history else None)
        passed = (trio.current_time() - began) / 60
        history.append((passed, held))
        print(f"{passed:6.1f} min", *(f"{value:11d}" for value in astuple(held)), flush=True)
    return history


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed.load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("minutes", type=float)
    minutes = parser.parse_args().minutes
    os.environ |= python_environment()  # for the server's wrapper, wherever this was started
    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        report, port = directory / "report", free_port()
        backing = _Backing(directory / "backing", stack)
        backing.start()
        server = stack.enter_context(
            nbdstream_serve(
                directory / "leaf.qcow2",
                backing.uri,
                *("--speed", SPEED, "--metrics", f"127.0.0.1:{port}"),
                prefix=[sys.executable, "-m", "testbed.counted", str(report)],
            )
        )
        print(" " * 10, *(f"{each.name:>11}" for each in fields(Held)))
        arranged = Arrangement(server, backing, report, ("127.0.0.1", port))
        history = trio.run(_load, arranged, minutes)
        found = grown(history)
        server.process.terminate()
        if server.wait(STOP_SECONDS) != 0:
            found.append("the server did not end cleanly")
        if "Traceback" in server.stderr():
            found.append(server.stderr())
        alone = f"driver=qcow2,file.filename={directory}/leaf.qcow2,backing="
        try:
            run(["qemu-img", "check", "-q", "--image-opts", alone])
        except PeerError as error:
            found.append(str(error)[:1000])
    print(*(found or [f"nothing grew in {minutes:g} minutes, {len(history)} rounds"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
