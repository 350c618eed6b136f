# SPDX-License-Identifier: Apache-2.0
"""Image formats that strangers wrote: the one node that qemu-nbd may open, and a look at it first.

An image can name other files as parts of itself: a backing file, an external data file, VMDK's
extents. QEMU opens them by itself. Three things keep it from that:

1. The node graph is explicit and whole: the format on top of one file or one NBD export, and
   ``backing`` null, or an image that the user has named. It is the same each time that the
   helper is started.
2. qemu-nbd runs where there is nothing else to be opened (`nbdstream.backing.sandbox`). This is
   what safety rests on: an image may show another header the second time that it is read.
3. `inspect` looks at the image first and refuses, by name, what would be read wrongly or not at
   all without its other files. It parses the image as well, so it is confined in the same way.
"""

import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import trio

from nbdstream.backing.confine import IMAGE, REPORT
from nbdstream.backing.connect import Endpoint
from nbdstream.backing.helper import program
from nbdstream.backing.sandbox import Policy
from nbdstream.backing.tls import QemuTls
from nbdstream.errors import BackingError, BackingGoneError
from nbdstream.net.address import NbdUri, TcpAddress, UnixAddress
from nbdstream.net.connect import open_socket

# URI prefix and QEMU's name of each image format that a backing may have.
FORMATS = {name: name for name in ("qcow2", "qed", "qcow", "vmdk", "vdi", "vhdx", "parallels")}
FORMATS["vpc"] = FORMATS["vhd"] = "vpc"
# The kinds of VMDK that are one file.
SINGLE_FILE_VMDK = ("monolithicSparse", "streamOptimized")
# How long qemu-img may look at an image, and how much it may say.
LOOK_TIMEOUT = 60.0
LOOK_MOST = 1 << 20


@dataclass(frozen=True)
class Node:
    """An image as QEMU sees it: a block node, what opening it takes, and arguments that QEMU's
    tools need besides."""

    node: dict[str, Any]
    policy: Policy
    arguments: tuple[str, ...] = ()

    @property
    def graph(self) -> str:
        """The node graph, as QEMU's tools take it for a file name."""
        return "json:" + json.dumps(self.node)


@dataclass(frozen=True)
class Chain:
    """Images each on the next, as qemu-storage-daemon is told of them: arguments that end with
    the node ``top``, and what opening them takes."""

    arguments: tuple[str, ...]
    top: str
    policy: Policy


def chained(nodes: Sequence[Node]) -> Chain:
    """A chain of images, the top first, as nodes that refer to each other by name.

    A graph in one piece, as qemu-nbd takes it, would have QEMU work out what the name of the
    backing in each image's header means, and it refuses where that is a relative path.
    """
    arguments: tuple[str, ...] = ()
    below: dict[str, Any] = {}
    name = ""
    for level, image in reversed(list(enumerate(nodes))):
        name = f"image{level}"
        file = image.node["file"] | {"read-only": True}
        node = image.node | below | {"node-name": name, "read-only": True, "file": file}
        arguments += (*image.arguments, "--blockdev", json.dumps(node))
        below = {"backing": name}
    policies = [image.policy for image in nodes]
    policy = Policy(
        sockets=tuple(path for policy in policies for path in policy.sockets),
        ports=tuple(port for policy in policies for port in policy.ports or ()),
        files=tuple(path for policy in policies for path in policy.files),
    )
    return Chain(arguments, name, policy)


def file_node(image_format: str, path: str, fd: int) -> Node:
    """An image in a file or block device that is open as ``fd``."""
    driver = "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"
    policy = Policy(image=fd, path=os.path.realpath(path))
    return Node(_node(image_format, {"driver": driver, "filename": IMAGE}), policy)


async def nbd_node(name: str, image_format: str, endpoint: Endpoint, level: int = 0) -> Node:
    """An image in an NBD export; ``name`` is what the user calls it, ``level`` its place in a
    chain.

    The host's name is looked up here: what reads the image reaches one port, and resolves no names.
    Raises BackingError.
    """
    export = NbdUri.parse(endpoint.uri)
    tls = endpoint.tls.for_qemu(f"tls{level}") if endpoint.tls is not None else QemuTls()
    node: dict[str, Any] = {"driver": "nbd", "export": export.export, **dict(tls.node)}
    match export.address:
        case UnixAddress(path):
            absolute = str(Path.cwd() / path)
            node["server"] = {"type": "unix", "path": absolute}
            policy = Policy(sockets=(absolute,), files=tls.files)
        case TcpAddress(_, port) as address:
            node["server"] = {"type": "inet", "host": await _resolved(name, address)}
            node["server"]["port"] = str(port)
            policy = Policy(ports=(port,), files=tls.files)
        case _:
            raise BackingError(f"{name}: QEMU reads image formats over TCP and Unix sockets only")
    return Node(_node(image_format, node), policy, tls.arguments)


def _node(image_format: str, file: dict[str, Any]) -> dict[str, Any]:
    whole = {"driver": image_format, "file": file}
    return whole if image_format == "raw" else whole | {"backing": None}


async def _resolved(name: str, address: TcpAddress) -> str:
    """The numeric address at which a host answers. Raises BackingGoneError."""
    try:
        with trio.fail_after(LOOK_TIMEOUT):
            sock = await open_socket(address)
        with sock:
            return str(sock.getpeername()[0])
    except (OSError, trio.TooSlowError) as error:
        words = getattr(error, "strerror", None) or "no answer"
        raise BackingGoneError(f"{name}: {words}") from error


async def inspect(name: str, image_format: str, node: Node, *, based: bool = False) -> None:
    """Refuse an image that is more than one file. ``name`` is what the user calls it;
    ``based``: the user has named its backing as well.

    Raises BackingError, also if it cannot be read.
    """
    qemu_img = program("qemu-img", "qemu-utils")
    command = [qemu_img, "info", "--output=json", *node.arguments, node.graph]
    status, output, words = await _look(command, node)
    try:
        facts: dict[str, Any] = json.loads(output) if status == 0 else {}
    except ValueError as error:
        raise BackingError(f"{name}: qemu-img does not say what it is: {error}") from error
    if not facts:
        raise BackingError(f"{name}: {_plain(words, node)}{_hint(image_format)}")
    named = facts.get("backing-filename")
    if named and not based:
        raise BackingError(
            f"{name}: the image has a backing file of its own ({named}): flatten it, or name that "
            "one, too ('IMAGE on BACKING')"
        )
    if based and not named:
        # QEMU would show the content of the other image where this one has zeroes.
        raise BackingError(f"{name}: the image has no backing file, so it is on no other image")
    details = facts.get("format-specific", {}).get("data", {})
    if "data-file" in details:
        raise BackingError(
            f"{name}: the image has its data in another file ({details['data-file']}): convert it"
        )
    if image_format == "vmdk" and details.get("create-type") not in SINGLE_FILE_VMDK:
        raise BackingError(f"{name}: a VMDK image of several files{_hint(image_format)}")


def _hint(image_format: str) -> str:
    return f" (VMDK: only {', '.join(SINGLE_FILE_VMDK)} is read)" if image_format == "vmdk" else ""


def _plain(words: str, node: Node) -> str:
    """A complaint of qemu-img without what we gave it to chew on."""
    words = words.strip().splitlines()[-1] if words.strip() else "qemu-img failed"
    words = words.removeprefix("qemu-img: ")
    for internal in (node.graph, IMAGE, node.policy.path):
        words = words.replace(f"Could not open '{internal}': ", "") if internal else words
        words = words.replace(internal, "it") if internal else words
    return words


async def _look(command: list[str], node: Node) -> tuple[int, bytes, str]:
    """Run a program on an image: status, standard output, standard error. Raises BackingError
    if it takes too long or says too much."""
    policy = node.policy
    descriptors = [policy.image] if policy.image >= 0 else []
    with tempfile.TemporaryDirectory(prefix="nbdstream-") as directory:
        # From this thread and not from a worker, as trio's open_process does it: the sandbox ends
        # the program with the thread that started it, and an idle worker ends after ten seconds.
        with subprocess.Popen(  # noqa: ASYNC220
            policy.command(command, directory, image_fd=policy.image),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=policy.variables(),
            pass_fds=descriptors,
        ) as process:
            output, words = bytearray(), bytearray()
            try:
                with trio.fail_after(LOOK_TIMEOUT):
                    async with trio.open_nursery() as nursery:
                        for pipe, into in ((process.stdout, output), (process.stderr, words)):
                            assert pipe is not None
                            nursery.start_soon(_take, pipe, into)
                    await _wait_ended(process.pid)
            except trio.TooSlowError as error:
                raise BackingError(f"qemu-img did not answer in {LOOK_TIMEOUT:g} s") from error
            finally:
                process.kill()
                status = process.wait()
    text = words.decode(errors="replace")
    return (
        status,
        bytes(output),
        "\n".join(line for line in text.splitlines() if not line.startswith(REPORT)),
    )


async def _wait_ended(pid: int) -> None:
    """Wait until a child has ended. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def _take(pipe: IO[bytes], into: bytearray) -> None:
    """Keep what a program says, up to a limit; beyond that it is not listened to."""
    fd = os.dup(pipe.fileno())
    pipe.close()
    async with trio.lowlevel.FdStream(fd) as stream:
        async for data in stream:
            if len(into) < LOOK_MOST:
                into += data
