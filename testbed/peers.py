# SPDX-License-Identifier: Apache-2.0
"""Real peers for tests and benchmarks: nbdkit, QEMU's tools, nbdstream; each runs as a process.

Every starter is a context manager that

- takes its binary from an environment variable (`BINARIES`), else from PATH, and raises
  `MissingPeer`, naming exactly what is missing;
- listens on a unix socket in a temporary directory of its own;
- returns only when the peer accepts connections, and raises `PeerError` with the peer's
  own words when it dies or dawdles instead;
- on exit sends SIGTERM, then SIGKILL to that one process, and removes its files;
- is blocking code: under trio, start peers in fixtures or before the nursery.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdstream.net.address import NbdUri, TcpAddress, UnixAddress

BINARIES = {
    "NBDKIT": "nbdkit",
    "NBDCOPY": "nbdcopy",
    "NBDINFO": "nbdinfo",
    "QEMU_NBD": "qemu-nbd",
    "QEMU_IMG": "qemu-img",
    "QEMU_IO": "qemu-io",
    "QEMU_STORAGE_DAEMON": "qemu-storage-daemon",
    "FIO": "fio",
    "SSHD": "/usr/sbin/sshd",
    "SSH_KEYGEN": "ssh-keygen",
    "NGINX": "/usr/sbin/nginx",
    "CERTTOOL": "certtool",
    "VERITYSETUP": "/usr/sbin/veritysetup",
    # Scripts that belong to the interpreter running the tests.
    "NBDSTREAM": str(Path(sys.executable).with_name("nbdstream")),
    "QMP_SHELL": str(Path(sys.executable).with_name("qmp-shell")),
    "MOTO_SERVER": str(Path(sys.executable).with_name("moto_server")),
}

READY_SECONDS = 20.0
STOP_SECONDS = 10.0
KIB = 1024


class MissingPeer(RuntimeError):  # noqa: N818
    """A program that a test or benchmark needs is not installed."""


class PeerError(RuntimeError):
    """A peer failed; the message carries its command line and its standard error."""


def binary(variable: str) -> str:
    """The path of the program that `variable` (a key of `BINARIES`) stands for.

    Raises MissingPeer when there is no such program.
    """
    wanted = os.environ.get(variable) or BINARIES[variable]
    found = shutil.which(wanted)
    if found is None:
        raise MissingPeer(f"{wanted} is not installed (set {variable} to use another)")
    return found


def run(argv: Sequence[str | Path], *, timeout: float = 60, check: bool = True) -> str:
    """Run a program to its end and return its standard output.

    `argv[0]` may be a program of `BINARIES` by its plain name. Raises PeerError when it
    exits with a status other than 0, unless `check` is false, or runs out of time.
    """
    names = {Path(name).name: variable for variable, name in BINARIES.items()}
    program = str(argv[0])
    if program in names:
        program = binary(names[program])
    command = [program, *map(str, argv[1:])]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{command} did not end within {timeout} s") from error
    if check and done.returncode != 0:
        raise PeerError(f"{command} exited with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def unix_uri(path: str | Path, export: str = "") -> str:
    """The NBD URI of `export` on the unix socket `path`."""
    return str(NbdUri(UnixAddress(str(path)), export))


@dataclass
class Peer:
    """A running peer.

    `uri` is its NBD URI and `socket` its NBD socket; `control` is the unix socket of its
    QMP server where it has one. `directory` holds its files and goes away with it.
    """

    process: subprocess.Popen[bytes]
    command: list[str]
    directory: Path
    uri: str = ""
    socket: Path = Path()
    control: Path | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def stdout(self) -> str:
        return (self.directory / "stdout").read_text()

    def stderr(self) -> str:
        return (self.directory / "stderr").read_text()

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float) -> None:
        """Return once `ready()` is true. Raises PeerError when the peer ends or `seconds` pass."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise PeerError(
                    f"{self.command} ended with status {self.process.returncode} "
                    f"before {what}: {self.stderr()}"
                )
            if time.monotonic() > deadline:
                raise PeerError(f"{self.command}: no {what} in {seconds} s: {self.stderr()}")
            time.sleep(0.002)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """Wait for the peer to end by itself; returns its exit status."""
        return self.process.wait(timeout)

    def terminate(self) -> int:
        """Ask the peer to stop (SIGTERM) and return its exit status; SIGKILL if it will not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """End the peer at once, as a crash would (SIGKILL)."""
        # Stopped processes (SIGSTOP) die of SIGKILL too, so this always ends.
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def started(command: list[str], directory: Path) -> Iterator[Peer]:
    """Run `command` with its output in files of `directory` (`stdout`, `stderr`)."""
    with open(directory / "stdout", "wb") as out, open(directory / "stderr", "wb") as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    peer = Peer(process, command, directory)
    try:
        yield peer
    finally:
        peer.terminate()


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory for sockets: its path is short, as `sun_path` demands."""
    with tempfile.TemporaryDirectory(prefix="nbds-") as name:
        yield Path(name)


def _uri(path: Path, port: int | None) -> str:
    """The URI of a peer on a Unix socket, or on a port if it is given one."""
    return unix_uri(path) if port is None else str(NbdUri(TcpAddress("localhost", port)))


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@contextlib.contextmanager
def nbdkit(
    *args: str | Path,
    filters: Sequence[str] = (),
    threads: int | None = None,
    readonly: bool = False,
    socket_path: Path | None = None,
    port: int | None = None,
) -> Iterator[Peer]:
    """nbdkit with a plugin, its parameters and its filters, e.g.

    `nbdkit("file", image, filters=["delay"], threads=64)` with `"rdelay=200ms"` among the
    arguments. `socket_path` allows a second server to take over the first one's address. With
    `port` it listens there on 127.0.0.1 instead.
    """
    with temporary_directory() as directory:
        path = socket_path or directory / "nbd"
        pidfile = directory / "pid"
        command = [binary("NBDKIT"), "--foreground", "--pidfile", str(pidfile)]
        command += (
            ["--unix", str(path)] if port is None else [f"--port={port}", "--ipaddr=127.0.0.1"]
        )
        command += [f"--filter={name}" for name in filters]
        command += [f"--threads={threads}"] if threads else []
        command += ["--readonly"] if readonly else []
        command += map(str, args)
        if socket_path is not None:
            # nbdkit does not replace the socket that a killed predecessor left.
            socket_path.unlink(missing_ok=True)
        with started(command, directory) as peer:
            peer.wait_until(lambda: _has_text(pidfile), "pid file", READY_SECONDS)
            peer.socket, peer.uri = path, _uri(path, port)
            yield peer


@contextlib.contextmanager
def qemu_nbd(
    image: str | Path,
    image_format: str = "raw",
    *args: str,
    readonly: bool = False,
    port: int | None = None,
) -> Iterator[Peer]:
    """qemu-nbd serving `image`, to many clients, until it is stopped.

    `args` are further options; with `--image-opts` among them `image` is such a string and
    `image_format` is not used. With `port` it listens there on 127.0.0.1.
    """
    with temporary_directory() as directory:
        path, pidfile = directory / "nbd", directory / "pid"
        command = [binary("QEMU_NBD"), "--persistent", "--shared=16", f"--pid-file={pidfile}"]
        command += ["--read-only"] if readonly else []
        command += [f"--socket={path}"] if port is None else [f"--port={port}", "--bind=127.0.0.1"]
        command += [] if "--image-opts" in args else ["--format", image_format]
        command += [*args, str(image)]
        with started(command, directory) as peer:
            peer.wait_until(lambda: _has_text(pidfile), "pid file", READY_SECONDS)
            peer.socket, peer.uri = path, _uri(path, port)
            yield peer


@contextlib.contextmanager
def qemu_storage_daemon(*args: str) -> Iterator[Peer]:
    """QEMU's storage daemon; `control` is its QMP socket, `socket` where its NBD server
    listens once `nbd-server-start` has been sent.
    """
    with temporary_directory() as directory:
        pidfile, control = directory / "pid", directory / "qmp"
        command = [binary("QEMU_STORAGE_DAEMON"), "--pidfile", str(pidfile)]
        command += ["--chardev", f"socket,id=qmp,path={control},server=on,wait=off"]
        command += ["--monitor", "chardev=qmp", *args]
        with started(command, directory) as peer:
            peer.wait_until(lambda: _has_text(pidfile), "pid file", READY_SECONDS)
            peer.socket, peer.control = directory / "nbd", control
            yield peer


@contextlib.contextmanager
def nbdstream_serve(
    leaf: str | Path,
    backing: str | None = None,
    *args: str,
    export: str = "",
    socket_path: Path | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Peer]:
    """`nbdstream serve LEAF [-b URI] ARGS` with a control socket, ready for clients.

    `socket_path` allows a second server to take over the first one's address; `prefix` is put
    before the command, which it has to replace itself with (exec).
    """
    with temporary_directory() as directory:
        path, control = socket_path or directory / "nbd", directory / "qmp"
        command = [*prefix, binary("NBDSTREAM"), "serve", str(leaf)]
        command += ["-b", backing] if backing else []
        command += [] if "--listen" in args else ["-U", str(path)]
        command += ["--control", str(control)]
        command += ["-e", export] if export else []
        command += args
        with started(command, directory) as peer:
            peer.wait_until(lambda: "\n" in peer.stdout(), "URI on stdout", READY_SECONDS)
            peer.uri = peer.stdout().splitlines()[0].strip()
            peer.socket, peer.control = path, control
            yield peer


class Qmp:
    """A blocking QMP client, as small as it gets: one connection, one command at a time.

    Raises PeerError for an error reply, OSError (TimeoutError among them) for a lost or
    silent server.
    """

    def __init__(self, path: Path, timeout: float = 30) -> None:
        self.events: list[dict[str, Any]] = []
        with contextlib.ExitStack() as on_failure:
            self._socket = on_failure.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            self._stream = on_failure.enter_context(self._socket.makefile("rwb"))
            greeting = self._receive()
            if "QMP" not in greeting:
                raise PeerError(f"not a QMP greeting: {greeting}")
            self.execute("qmp_capabilities")
            on_failure.pop_all()

    def __enter__(self) -> "Qmp":
        return self

    def __exit__(self, *_: object) -> None:
        with self._socket, contextlib.suppress(OSError):
            self._stream.close()

    def _receive(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise ConnectionError("the QMP server closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """Send `command` and return its result; underscores in argument names become dashes.

        Events that come meanwhile are kept in `events`.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, **({"arguments": named} if named else {})}
        self._stream.write(json.dumps(request).encode() + b"\n")
        self._stream.flush()
        while True:
            reply = self._receive()
            if "error" in reply:
                raise PeerError(f"{command}: {reply['error'].get('desc', reply['error'])}")
            if "return" in reply:
                return reply["return"]
            self.events.append(reply)

    def wait_event(self, name: str) -> dict[str, Any]:
        """The first event called `name` that has not been returned yet."""
        while True:
            for index, event in enumerate(self.events):
                if event.get("event") == name:
                    return self.events.pop(index)
            self.events.append(self._receive())


def make_image(path: Path, size: int, *, seed: int = 0, sparse: bool = True) -> None:
    """Write a raw image of `size` bytes whose content depends on `size` and `seed` alone.

    With `sparse` about half of it is random data, the rest holes and written zeroes, in
    pieces whose borders are multiples of 512 bytes but of no cluster size; without, all of
    it is random data.
    """
    numbers = random.Random(f"{size} {seed}")
    with open(path, "wb") as image:
        image.truncate(size)
        offset = 0
        while offset < size:
            length = 1024 * KIB if not sparse else 512 * numbers.randint(1, 1024)
            length = min(length, size - offset)
            kind = numbers.choice(("data", "data", "hole", "zero")) if sparse else "data"
            if kind == "data":
                os.pwrite(image.fileno(), numbers.randbytes(length), offset)
            elif kind == "zero":
                os.pwrite(image.fileno(), bytes(length), offset)
            offset += length


def make_qcow2(
    path: Path, size: int | None = None, *, backing: str = "", options: str = ""
) -> None:
    """`qemu-img create` a qcow2 image; `backing` is a file name or URI of raw content."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    command += ["-b", backing, "-F", "raw"] if backing else []
    command += ["-o", options] if options else []
    run([*command, path, *([str(size)] if size is not None else [])])


def assert_same(a: str | Path, b: str | Path, format_a: str = "raw", format_b: str = "raw") -> None:
    """Compare two images or exports with `qemu-img compare`.

    Raises AssertionError with its words when they differ in content or size.
    """
    command = [binary("QEMU_IMG"), "compare", "-U", "-f", format_a, "-F", format_b]
    done = subprocess.run([*command, str(a), str(b)], capture_output=True, text=True, timeout=120)
    # A shorter image with zeroes missing at its end only earns a warning.
    if done.returncode != 0 or "size mismatch" in done.stdout + done.stderr:
        raise AssertionError(f"{a} and {b} differ: {done.stdout}{done.stderr}")
