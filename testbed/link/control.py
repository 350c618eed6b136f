# SPDX-License-Identifier: Apache-2.0
"""Addresses of a link, and the line protocol that steers it while it runs.

One command a line, answered by one line of JSON: an object, `{"error": TEXT}` on failure.

    set [rate=R] [delay=D] [jitter=D] [queue=N]    change these properties
    stall [SECONDS] | resume                       freeze both directions; go on
    cut reset | cut blackhole | restore            see `proxy`
    stats                                          counters (`bytes` per direction, ...)
    quit

R is in bits per second, with `k M G` for powers of 1000, or `unlimited`; N is a size in
bytes, with powers of 1024, or `default`; D is a duration such as `10ms`.

`Steering` has a method for each; the emulator in a thread (`proxy.Link`) and the one in
a process of its own (`LinkProcess`) are steered alike.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nbdstream.errors import UsageError
from nbdstream.units import parse_duration, parse_size
from testbed.link.model import Shape
from testbed.processes import processor_seconds, python_environment

CutMode = Literal["reset", "blackhole"]

START_SECONDS = 10.0
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kKMG]?)")
_POWERS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_bit_rate(text: str) -> float | None:
    """Bits per second; None for `unlimited`. Raises ValueError."""
    if text == "unlimited":
        return None
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate: give bits per second, such as 100M")
    return float(match[1]) * _POWERS[match[2]]


def parse_queue(text: str) -> int | None:
    """Bytes; None for `default`. Raises ValueError."""
    try:
        return None if text == "default" else parse_size(text)
    except UsageError as error:
        raise ValueError(str(error)) from error


def parse_seconds(text: str) -> float:
    """Seconds. Raises ValueError."""
    try:
        return parse_duration(text)
    except UsageError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Address:
    """`HOST:PORT` or `unix:PATH`."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: "Address | str") -> "Address":
        """Raises ValueError."""
        if isinstance(text, Address):
            return text
        if text.startswith("unix:"):
            return cls(path=text.removeprefix("unix:"))
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal():
            raise ValueError(f"{text!r} is not an address: give HOST:PORT or unix:PATH")
        return cls(host=host.strip("[]"), port=int(port))

    @classmethod
    def of(cls, sock: socket.socket) -> "Address":
        """Where `sock` is bound."""
        name = sock.getsockname()
        return cls(path=name) if sock.family == socket.AF_UNIX else cls(name[0], name[1])

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def uri(self, export: str = "") -> str:
        """The NBD URI of `export` on a server with this address."""
        return f"nbd+unix:///{export}?socket={self.path}" if self.path else f"nbd://{self}/{export}"

    @property
    def _endpoint(self) -> Any:
        return self.path or (self.host, self.port)

    def _socket(self, receive_buffer: int | None) -> socket.socket:
        family = socket.AF_UNIX if self.path else socket.AF_INET
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else family)
        if receive_buffer is not None:
            # Before the handshake: TCP's window scale is agreed on then.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        return sock

    def listen(self, backlog: int, receive_buffer: int | None) -> socket.socket:
        """A non-blocking socket that listens here. Raises OSError."""
        sock = self._socket(receive_buffer)
        try:
            if not self.path:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self._endpoint)
            sock.listen(backlog)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    def connect(self, timeout: float, receive_buffer: int | None = None) -> socket.socket:
        """A socket connected to here, with `timeout` still set. Raises OSError."""
        sock = self._socket(receive_buffer)
        sock.settimeout(timeout)
        try:
            sock.connect(self._endpoint)
        except OSError:
            sock.close()
            raise
        return sock

    def unlink(self) -> None:
        """Remove the file of a unix socket that listened here."""
        if self.path:
            Path(self.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Command:
    """A parsed line: what its verb needs is set."""

    verb: str
    shape: Shape | None = None
    seconds: float | None = None
    mode: str = ""


def parse_command(line: str, shape: Shape) -> Command:
    """`line` as a command to a link that has `shape` now. Raises ValueError."""
    match line.split():
        case ["set", *settings]:
            return Command("set", shape=_parse_settings(settings, shape))
        case ["stall"]:
            return Command("stall")
        case ["stall", seconds]:
            return Command("stall", seconds=parse_seconds(seconds))
        case ["cut", "reset" | "blackhole" as mode]:
            return Command("cut", mode=mode)
        case ["resume" | "restore" | "stats" | "quit" as verb]:
            return Command(verb)
    raise ValueError(f"no such command: {line.strip()!r}")


def _parse_settings(settings: list[str], shape: Shape) -> Shape:
    parsers = {
        "rate": parse_bit_rate,
        "delay": parse_seconds,
        "jitter": parse_seconds,
        "queue": parse_queue,
    }
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in parsers:
            raise ValueError(f"no such setting: {setting!r}")
        changes[name] = parsers[name](value)
    return replace(shape, **changes)


def settings_line(shape: Shape) -> str:
    """The `set` command that gives a link `shape`."""
    rate = "unlimited" if shape.rate is None else f"{shape.rate:f}"
    queue = "default" if shape.queue is None else shape.queue
    return f"set rate={rate} delay={shape.delay:f} jitter={shape.jitter:f} queue={queue}"


class Steering(ABC):
    """What can be done to a running link. Each method returns when it has taken effect."""

    address: Address

    @abstractmethod
    def command(self, line: str) -> dict[str, Any]:
        """Carry out one line of the protocol. Raises ValueError or OSError."""

    def uri(self, export: str = "") -> str:
        """The NBD URI of the target's `export` through this link."""
        return self.address.uri(export)

    def set(self, shape: Shape) -> None:
        """Change the link's properties, for what has not been transmitted yet."""
        self.command(settings_line(shape))

    def stall(self, seconds: float | None = None) -> None:
        """Freeze both directions, for `seconds` or until resume()."""
        self.command("stall" if seconds is None else f"stall {seconds:f}")

    def resume(self) -> None:
        """End a stall."""
        self.command("resume")

    def cut(self, mode: CutMode) -> None:
        """Cut the link; `restore` mends it for new connections."""
        self.command(f"cut {mode}")

    def restore(self) -> None:
        """End a cut."""
        self.command("restore")

    def stats(self) -> dict[str, Any]:
        """Counters: `time` (monotonic seconds), `accepted` and open `connections`, and for
        `up` and `down` the `bytes` transmitted, `queued` now and `max_queued`.
        """
        return self.command("stats")


class LinkProcess(Steering):
    """A link in a process of its own, so that it shares no interpreter with its users."""

    def __init__(self, process: subprocess.Popen[str], address: Address) -> None:
        self._process = process
        self.address = address

    def command(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline() or "null")
        if not isinstance(reply, dict):
            raise ConnectionError("the link emulator has ended")
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def processor_seconds(self) -> float:
        """Processor time, user and system, that the emulator has used."""
        return processor_seconds(self._process.pid)


@contextlib.contextmanager
def link_process(
    listen: Address | str, target: Address | str, shape: Shape
) -> Iterator[LinkProcess]:
    """Run the emulator in a process of its own while the context lasts."""
    command = [sys.executable, "-m", "testbed.link", "--listen", str(listen), "--to", str(target)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=python_environment(),
    )
    assert process.stdin and process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise ConnectionError(f"{command} ended with status {process.wait(START_SECONDS)}")
        link = LinkProcess(process, Address.parse(line.strip()))
        link.set(shape)
        yield link
    finally:
        process.terminate()
        process.wait()
        process.stdin.close()
        process.stdout.close()
