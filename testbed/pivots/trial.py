# SPDX-License-Identifier: Apache-2.0
"""A guest that writes all the time, pivoted again and again until its QEMU is killed; each attempt
is struck at a random step. Nothing that it was told is durable may be lost.
"""

import json
import os
import random
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from nbdstream.guest.disks import Disk
from nbdstream.pivot.leftovers import LEAF
from nbdstream.tasks import open_background_nursery
from testbed.guests.images import copy_image
from testbed.guests.systems import RunningGuest
from testbed.migrations import arrangement
from testbed.migrations.afterwards import as_raw
from testbed.migrations.arrangement import Ends, last_acknowledged, records
from testbed.peers import Peer, PeerError, binary, nbdstream_serve, run, temporary_directory
from testbed.pivots.relay import Relay, Strike

VICTIMS = ("tool", "server", "qemu", "answer", "tool and server")
# Commands of a pivot from the one on by which QEMU remembers that the guest is to go on.
FIRST = "nbdstream-stopped"
COMMANDS = 13
ATTEMPTS_MOST = 12
TOOL_SECONDS = 300
RECONNECT_DELAY = 120
# What the operator's attempts may take, QEMU's patience included.
GO_ON_SECONDS = 400


@dataclass(frozen=True)
class Attempt:
    """``victim`` was struck before or ``after`` the command ``struck`` ("": the pivot was over
    before), and what the tool said then, and how it went on."""

    victim: str
    after: bool
    struck: str
    said: str
    outcome: str

    def __str__(self) -> str:
        when = "after" if self.after else "before"
        place = f"{when} {self.struck}" if self.struck else "not struck"
        return f"{self.victim:15} {place:34} {self.outcome:16} {self.said}"


class Trial:
    """One guest on one leaf. ``attempts`` is the list of its pivots so far."""

    def __init__(self, image: Path, suffix: str, draw: random.Random) -> None:
        self.attempts: list[Attempt] = []
        self._image = image
        self._suffix = suffix
        self._draw = draw

    async def run(self, attempts: int = ATTEMPTS_MOST) -> int:
        """Pivot so often, or until QEMU is killed; returns how many records were acknowledged.

        Raises:
            AssertionError: some of them are lost, the image is damaged, or the guest did not go on.
        """
        with temporary_directory() as directory, ExitStack() as stack:
            ends = Ends(directory, self._image)
            leaf = directory / f"leaf.{self._suffix}"
            self._make(leaf)
            server = stack.enter_context(nbdstream_serve(leaf, socket_path=directory / "nbd"))
            disk = Disk.nbd(server.uri, RECONNECT_DELAY)
            async with arrangement.source(ends, disk) as guest:
                scene = _Scene(ends, leaf, server, guest, stack)
                for _ in range(attempts):
                    attempt = await scene.attempt(self._draw)
                    self.attempts.append(attempt)
                    if attempt.outcome == "QEMU killed":
                        break
                    if attempt.outcome == "on its leaf":
                        await scene.attach_again()
                await guest.guest.kill()
                text = guest.console.transcript
            assert "I/O error" not in text
            scene.server.terminate()
            if self._suffix == "qcow2":
                report = run(["qemu-img", "check", "--output=json", leaf], check=False)
                assert not json.loads(report).get("corruptions"), report
            last = last_acknowledged(text)
            assert records(as_raw(leaf, self._suffix)) >= last > 0
            return last

    def _make(self, leaf: Path) -> None:
        image = self._image / "disk.raw"
        if self._suffix == "raw":
            copy_image(image, leaf)
        else:
            run(["qemu-img", "convert", "-f", "raw", "-O", self._suffix, image, leaf])


@dataclass
class _Scene:
    """The guest, and the server that its disk has now."""

    ends: Ends
    leaf: Path
    server: Peer
    guest: RunningGuest
    stack: ExitStack
    number: int = 0

    async def attempt(self, draw: random.Random) -> Attempt:
        """One pivot that is struck, and what its operator does then."""
        victim, after = draw.choice(VICTIMS), draw.random() < 0.5
        strike = Strike(FIRST, draw.randrange(COMMANDS), after, None)
        self.number += 1
        qmp, control = (self.ends.path(f"{kind}{self.number}") for kind in ("qmp", "control"))
        async with open_background_nursery() as nursery:
            await nursery.start(Relay(strike, self.ends.path("source.qmp")).run, qmp)
            await nursery.start(Relay(strike, str(self.server.control)).run, control)
            tool = _tool(control, qmp)
            if victim != "answer":
                strike.act = lambda: self._kill(victim, tool)
            said = (await _end_of(tool)).strip()
        outcome = await self._go_on(tool.returncode)
        words = said.splitlines()[-1] if said else "killed"
        return Attempt(victim, after, strike.struck, words, outcome)

    async def attach_again(self) -> None:
        """Put the guest's disk back on a server, for the next pivot."""
        qmp = self.guest.guest.qmp
        await qmp.execute("stop")
        size = (await qmp.execute("query-block"))[0]["inserted"]["image"]["virtual-size"]
        # QEMU has to close the leaf before the server can have it.
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "none", "size": size})
        await self._replace("none")
        for node in await qmp.execute("query-named-block-nodes", {"flat": True}):
            if node["node-name"].startswith(LEAF):
                await qmp.execute("blockdev-del", {"node-name": node["node-name"]})
        self._serve_again()
        disk = Disk.nbd(self.server.uri, RECONNECT_DELAY).blockdev["file"]
        name = f"export{self.number}"
        await qmp.execute("blockdev-add", {**disk, "node-name": name})
        await self._replace(name)
        await qmp.execute("blockdev-del", {"node-name": "none"})
        await qmp.execute("cont")

    async def _replace(self, file: str) -> None:
        options = {"driver": "raw", "node-name": "disk0", "discard": "unmap", "file": file}
        await self.guest.guest.qmp.execute("blockdev-reopen", {"options": [options]})

    def _try_to_serve_again(self) -> None:
        """In vain while QEMU has the leaf: it gives the dead server up after `RECONNECT_DELAY`, and
        then the tool can have it close the leaf."""
        try:
            self._serve_again()
        except PeerError as error:
            if "is in use" not in str(error):
                raise

    def _serve_again(self) -> None:
        self.server.terminate()
        serving = nbdstream_serve(self.leaf, socket_path=self.server.socket)
        self.server = self.stack.enter_context(serving)

    def _kill(self, victim: str, tool: "subprocess.Popen[str]") -> None:
        if "tool" in victim:
            tool.kill()
        if "server" in victim:
            self.server.kill()
        if victim == "qemu":
            os.kill(self.guest.guest.process.pid, signal.SIGKILL)

    async def _go_on(self, status: int) -> str:
        """Do what docs/pivot.md says; how the guest goes on."""
        if await self._qemu_is_dead():
            return "QEMU killed"
        again = status
        if status < 0 or self._server_is_dead():
            with trio.fail_after(GO_ON_SECONDS):
                while again := await self._again():
                    if self._server_is_dead():
                        self._try_to_serve_again()
        seen = last_acknowledged(self.guest.console.transcript)
        await self.guest.console.wait_for(rf"ACK {seen + 2}\b", 120)
        return "on its leaf" if again == 0 else "goes on"

    async def _again(self) -> int:
        tool = _tool(str(self.server.control), self.ends.path("source.qmp"))
        print(f"again: {(await _end_of(tool)).strip()}", flush=True)
        return tool.returncode

    def _server_is_dead(self) -> bool:
        return self.server.process.poll() is not None

    async def _qemu_is_dead(self) -> bool:
        with trio.move_on_after(1):
            await self.guest.guest.wait()
        return self.guest.guest.process.returncode is not None


def _tool(control: str, qmp: str) -> "subprocess.Popen[str]":
    command = [binary("NBDSTREAM"), "pivot", control, "--qmp", qmp]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)


async def _end_of(tool: "subprocess.Popen[str]") -> str:
    """What it said until it ended."""
    with trio.fail_after(TOOL_SECONDS):
        said, _ = await trio.to_thread.run_sync(tool.communicate, abandon_on_cancel=True)
    return said
