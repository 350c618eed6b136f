# SPDX-License-Identifier: Apache-2.0
"""A stand-in for qemu-nbd(8) that starts ``nbdstream serve``.

    python -m testbed.suites.qemu_nbd [OPTIONS of qemu-nbd] FILE

Options are those of qemu-nbd. A call that is none to our server (listing exports, a bitmap, a
snapshot, another format) goes to qemu-nbd itself. Each call is logged in the file that
NBDSTREAM_STAND_IN_LOG names, with who served it.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from testbed.peers import Qmp, binary

FORMATS = ("raw", "qcow2", "qed")


class NotOurs(Exception):  # noqa: N818
    """The call asks for what our server does not do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise NotOurs(message)


def parser() -> argparse.ArgumentParser:
    """qemu-nbd's options, as far as our server has them."""
    found = _Parser(prog="qemu-nbd", add_help=False, allow_abbrev=False)
    found.add_argument("-b", "--bind", default="0.0.0.0")
    found.add_argument("-p", "--port", default="10809")
    found.add_argument("-k", "--socket")
    found.add_argument("-e", "--shared", type=int)
    found.add_argument("-t", "--persistent", action="store_true")
    found.add_argument("-x", "--export-name", default="")
    found.add_argument("-D", "--description")
    found.add_argument("-f", "--format")
    found.add_argument("-r", "--read-only", action="store_true")
    found.add_argument("-A", "--allocation-depth", action="store_true")
    found.add_argument("-v", "--verbose", action="store_true")
    found.add_argument("--fork", action="store_true")
    found.add_argument("--pid-file")
    found.add_argument("--object", action="append", default=[])
    found.add_argument("--tls-creds")
    found.add_argument("--tls-hostname")
    found.add_argument("--cache", choices=["writeback", "none"])
    found.add_argument("--aio")
    found.add_argument("--discard")
    found.add_argument("file")
    return found


def command_of(options: argparse.Namespace) -> list[str]:
    """Our command. Raises NotOurs."""
    file = options.file
    if file.startswith("json:") or ":" in file.split("/")[0] or not Path(file).is_file():
        raise NotOurs("no image file")
    command = [binary("NBDSTREAM"), "serve", file, "-f", options.format or _probed(file)]
    if "LISTEN_FDS" in os.environ:
        pass  # it has its socket
    elif options.socket:
        command += ["-U", options.socket]
    else:
        command += ["--listen", f"{options.bind}:{options.port}"]
    command += ["-e", options.export_name]
    if chain := _backing(file):
        command += ["-b", chain, "--stream", "off", "--copy-on-read", "off"]
    for name, value in (("--max-clients", options.shared), ("--description", options.description)):
        if value:
            command += [name, str(value)]
    if options.read_only:
        command.append("--read-only")
    if options.tls_creds:
        command += _tls(options)
    return command


def _probed(file: str) -> str:
    """By its content, as qemu-nbd does where no format is given."""
    with open(file, "rb") as image:
        magic = image.read(4)
    return {b"QFI\xfb": "qcow2", b"QED\0": "qed"}.get(magic, "raw")


def _backing(file: str) -> str | None:
    """The chain of images below one that another tool has made: our server wants it named."""
    command = ["/usr/bin/qemu-img", "info", "-U", "--backing-chain", "--output=json", file]
    chain = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    images = [f"{image['format']}+{Path(image['filename']).absolute()}" for image in chain[1:]]
    return " on ".join(images).replace("raw+", "") or None


def _tls(options: argparse.Namespace) -> list[str]:
    for text in options.object:
        kind, *pairs = text.split(",")
        values = dict(pair.split("=", 1) for pair in pairs)
        if kind == "tls-creds-x509" and values.get("id") == options.tls_creds:
            found = ["--tls-certificates", values["dir"], "--tls", "require"]
            verify = values.get("verify-peer", "on") in ("on", "yes")
            return [*found, *(["--tls-verify-peer"] if verify else [])]
    raise NotOurs("no certificates")


# -- running ----------------------------------------------------------------------------------


def main() -> None:
    words = sys.argv[1:]
    try:
        options = parser().parse_args(words)
        command = command_of(options)
    except NotOurs as reason:
        _log(f"qemu-nbd ({reason}): {' '.join(words)}")
        qemu_nbd = binary("QEMU_NBD_REAL")
        os.execv(qemu_nbd, ["qemu-nbd", *words])
    _log(f"nbdstream: {' '.join(words)}")
    if options.fork:
        _wait_for_another()
    _become(options, command)


_READY = b"ready"
_TELL = 9  # the descriptor by which the caller of ``--fork`` learns that


def _log(line: str) -> None:
    if place := os.environ.get("NBDSTREAM_STAND_IN_LOG"):
        with open(place, "a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            log.write(f"{line}\n")


def _wait_for_another() -> None:
    """Go on in a new process, as a daemon; the caller ends when that does, or says `_READY`."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with open(reader, "rb") as pipe:
            sys.exit(0 if pipe.read() == _READY else 1)
    os.setsid()
    os.close(reader)
    os.dup2(writer, _TELL)
    os.close(writer)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)


def _become(options: argparse.Namespace, command: list[str]) -> NoReturn:
    """Go on as the server: the caller knows this process. Another one looks after it."""
    directory = tempfile.mkdtemp(prefix="nbdstream-")
    control = Path(directory) / "control"
    if not options.persistent:
        command = [*command, "--control", str(control)]
    reader, writer = os.pipe()
    server = os.getpid()
    if os.fork() == 0:
        os.close(writer)
        with contextlib.suppress(OSError):
            _look_after(server, reader, options, control)
        shutil.rmtree(directory)
        os._exit(0)
    if options.fork:
        os.close(_TELL)
    os.dup2(writer, 1)
    os.execv(command[0], command)


def _look_after(server: int, reader: int, options: argparse.Namespace, control: Path) -> None:
    with open(reader, "rb") as pipe:
        if not pipe.readline():
            return  # it failed; else that was its URI: it accepts connections
        if options.pid_file:
            Path(options.pid_file).write_text(f"{server}\n")
        if options.fork:
            os.write(_TELL, _READY)
            os.close(_TELL)
        for fd in (1, 2):  # who waits for the end of the server's output does not wait for ours
            os.close(fd)
        if not options.persistent:
            with Qmp(control, timeout=3600) as qmp:
                while qmp.wait_event("X_NBDSTREAM_CLIENTS_CHANGE")["data"]["clients"]:
                    pass
            os.kill(server, signal.SIGTERM)
            pipe.read()


if __name__ == "__main__":
    main()
