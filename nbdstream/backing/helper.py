# SPDX-License-Identifier: Apache-2.0
"""Helper processes: NBD servers of our own for what libnbd does not read by itself.

nbdkit and qemu-nbd already know HTTPS, SSH, S3 and image formats. A helper is one of
them on a unix socket in a private directory.

The socket is *ours*: we listen on it and pass it on by systemd's socket activation
(``LISTEN_FDS``, fd 3). So there is nothing to wait for before the first connection, and
when a helper dies and is started again, connections made meanwhile wait in the
socket's queue for the next one. A helper never outlives us: it is killed at the end of
the block, and by the kernel (PR_SET_PDEATHSIG) if we are killed ourselves.
"""

import logging
import os
import re
import shutil
import signal
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from nbdstream.backing.confine import REPORT
from nbdstream.backing.pool import BACKOFF_FIRST, BACKOFF_MOST, GOOD_LIFE, jittered
from nbdstream.backing.sandbox import Policy
from nbdstream.errors import BackingError
from nbdstream.net.address import NbdUri, UnixAddress
from nbdstream.tasks import open_background_nursery
from nbdstream.web.errors import REFUSES, WARNS

log = logging.getLogger(__name__)

# Socket activation: the listening socket's number in the new process.
LISTEN_FD = 3
BACKLOG = 64
# Of what a helper says on standard error, so many of the last lines are kept.
LINES_KEPT = 8
# What begins the last line of a Python plugin's complaint: the name of the exception.
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): ")
# The image's, the secret's and the state's descriptors there.
IMAGE_FD = 4
SECRET_FD = 5
STATE_FD = 6


class Helper:
    """A helper process, started again whenever it dies.

    Attributes:
        uri: its export, for libnbd.
        alive: whether it runs right now.
        died: set when it has died once.
        spoke: set when it has written to standard error.
        sandbox: what confines it, in words; "" as long as it has not been started.
        refused: set when it refuses its source for good; ``refusal`` says why.
    """

    def __init__(
        self, launch: "Launch", path: str, root: str, listener: socket.socket, state: int
    ) -> None:
        self.uri = str(NbdUri(UnixAddress(path)))
        self.alive = False
        self.died = trio.Event()
        self.spoke = trio.Event()
        self.sandbox = ""
        self.refused = trio.Event()
        self.refusal = ""
        self._launch = launch
        self._state = state
        self._name = os.path.basename(launch.command[0])
        self._root = root
        self._listener = listener
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)

    @property
    def words(self) -> str:
        """The last thing that the helper had to say, or ""."""
        return _EXCEPTION.sub("", self._lines[-1]) if self._lines else ""

    async def run(self) -> None:
        """Keep the helper running until cancelled."""
        delay = BACKOFF_FIRST
        while True:
            began = trio.current_time()
            try:
                status = await self._run_once()
                log.warning("%s ended with status %d: %s", self._name, status, self.words)
            except OSError as error:  # no descriptors or no memory, for now
                self._lines.append(f"{self._name} cannot be started: {error.strerror}")
                log.warning("%s", self.words)
            self.died.set()
            if trio.current_time() - began > GOOD_LIFE + delay:
                delay = BACKOFF_FIRST
            await trio.sleep(jittered(delay))
            delay = min(delay * 2, BACKOFF_MOST)

    async def _run_once(self) -> int:
        """Start it and wait for its end; cancelled, kill it. Returns its exit status."""
        reader, writer = os.pipe()
        try:
            pid = self._spawn(writer)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.close(reader)
            _end(pid)
            raise
        self.alive = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen_to, reader)
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            self.alive = False
            status = _end(pid)
            os.close(pidfd)
        return status

    def _spawn(self, stderr: int) -> int:
        # From this thread and not from a worker: PR_SET_PDEATHSIG is about the thread.
        policy = self._launch.policy
        command = policy.command(self._launch.command, self._root, IMAGE_FD)
        with ExitStack() as stack:
            null = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, null)
            secret = -1
            if self._launch.secret:
                secret = _in_memory(self._launch.secret)
                stack.callback(os.close, secret)
            listener = self._listener.fileno()
            passed = [null, null, stderr, listener, policy.image, secret, self._state]
            return os.posix_spawn(
                command[0],
                command,
                policy.variables() | {"LISTEN_FDS": "1"},
                file_actions=_placed(passed),
                # A Ctrl-C on the terminal is for us; the helper goes when we let it go.
                setpgroup=0,
            )

    async def _listen_to(self, reader: int) -> None:
        """Keep the last lines that the helper writes, until it closes its end."""
        async with trio.lowlevel.FdStream(reader) as stream:
            rest = b""
            async for data in stream:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._heed(line.decode(errors="replace").strip())
                rest = rest[-4096:]

    def _heed(self, text: str) -> None:
        """Make sense of a line that the helper wrote."""
        if text.startswith(REPORT):
            self.sandbox = text.removeprefix(REPORT)
        elif text.startswith(WARNS):
            log.warning("%s", text.removeprefix(WARNS))
        elif text.startswith(REFUSES):
            self.refusal = text.removeprefix(REFUSES)
            self.refused.set()
        elif text:
            log.debug("%s: %s", self._name, text)
            self._lines.append(text)
            self.spoke.set()


def _end(pid: int) -> int:
    """Kill a helper and wait for it. It is ours until it is waited for, so the number cannot be
    another's. Returns its exit status."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@dataclass(frozen=True)
class Launch:
    """A program to be run: its command, what it may open, and a secret that it gets to read
    by descriptor `SECRET_FD` instead of on its command line.

    ``stateful``: what it writes to `STATE_FD`, a file in memory, is there when it is started
    again."""

    command: Sequence[str]
    policy: Policy
    secret: str = field(default="", repr=False)
    stateful: bool = False


@asynccontextmanager
async def run_helper(launch: Launch) -> AsyncIterator[Helper]:
    """Run a helper for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="nbdstream-") as directory:
        path, root = os.path.join(directory, "nbd"), os.path.join(directory, "root")
        Path(root).mkdir()  # noqa: ASYNC240 - in memory, or nearly
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(path)
            listener.listen(BACKLOG)
            state = -1
            if launch.stateful:
                state = _in_memory("")
                stack.callback(os.close, state)
            helper = Helper(launch, path, root, listener, state)
            async with open_background_nursery() as nursery:
                nursery.start_soon(helper.run)
                yield helper


def _placed(descriptors: Sequence[int]) -> list[tuple[int, int, int] | tuple[int, int]]:
    """Spawn actions that give the child these descriptors as 0, 1, 2 and so on; -1: none.

    In two steps, because one of them may have the number that another gets.
    """
    wanted = [(fd, number) for number, fd in enumerate(descriptors) if fd >= 0]
    away = max(*descriptors, len(descriptors)) + 1
    moves: list[tuple[int, int, int] | tuple[int, int]] = []
    moves += [(os.POSIX_SPAWN_DUP2, fd, away + number) for fd, number in wanted]
    moves += [(os.POSIX_SPAWN_DUP2, away + number, number) for _, number in wanted]
    moves += [(os.POSIX_SPAWN_CLOSE, away + number) for _, number in wanted]
    return moves


def _in_memory(text: str) -> int:
    """A file in memory, which can be read again each time that it is opened."""
    fd = os.memfd_create("nbdstream", os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    return fd


def program(name: str, package: str) -> str:
    """Where a program is. Raises BackingError that names the Debian package if nowhere."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise BackingError(f"{name} is not installed (apt install {package})")
    return found
