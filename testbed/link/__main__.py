# SPDX-License-Identifier: Apache-2.0
"""The link emulator as a command: makes a local NBD server look far away.

    python -m testbed.link --listen 127.0.0.1:0 --to unix:/run/nbd.sock \\
        --rate 100M --delay 10ms --control /run/link.ctl

Prints the address it listens on once it does; `--help` describes the options. Commands
(`control`) are taken from standard input and answered on standard output, and by every
client of the unix socket `--control`. It ends on `quit`, SIGTERM or SIGINT; the end of
standard input ends nothing. What it emulates is described in `model`, how in `proxy`.
"""

import argparse
import json
import signal
import socket
import sys
import threading
from typing import TextIO

from testbed.link.control import Address, parse_command
from testbed.link.model import Shape
from testbed.link.proxy import LISTEN_BACKLOG, Link

# Held from a command to its reply, so that the reply to `quit` gets out.
_answering = threading.Lock()


def _serve_lines(link: Link, lines: TextIO, replies: TextIO) -> None:
    """Answer commands until the stream ends or the replies are not read."""
    for line in lines:
        with _answering:
            try:
                reply = link.command(line)
            except (ValueError, OSError) as error:
                reply = {"error": str(error)}
            try:
                print(json.dumps(reply), file=replies, flush=True)
            except OSError:
                return


def _serve_client(link: Link, client: socket.socket) -> None:
    # Two streams: a text stream that is written to forgets what it has read ahead.
    with client, client.makefile("r") as lines, client.makefile("w") as replies:
        _serve_lines(link, lines, replies)


def _serve_control(link: Link, listener: socket.socket) -> None:
    listener.setblocking(True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_serve_client, args=(link, client), daemon=True).start()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m testbed.link",
        description="Proxy connections over an emulated link. Prints the address it listens "
        "on, then takes commands on standard input: set, stall, resume, cut, restore, stats, quit.",
    )
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT or unix:PATH")
    parser.add_argument("--to", required=True, help="the target, HOST:PORT or unix:PATH")
    parser.add_argument("--rate", default="unlimited", help="bits per second each way, e.g. 100M")
    parser.add_argument("--delay", default="0", help="one way, e.g. 10ms")
    parser.add_argument("--jitter", default="0", help="at most this much is added, one way")
    parser.add_argument("--queue", default="default", help="bytes that may wait, e.g. 256k")
    parser.add_argument("--control", metavar="PATH", help="unix socket that takes commands too")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    settings = f"rate={arguments.rate} delay={arguments.delay} jitter={arguments.jitter}"
    try:
        shape = parse_command(f"set {settings} queue={arguments.queue}", Shape()).shape
        assert shape
        link = Link(arguments.listen, arguments.to, shape)
        control = Address(path=arguments.control) if arguments.control else None
        commands = control.listen(LISTEN_BACKLOG, None) if control else None
    except (ValueError, OSError) as error:
        sys.exit(f"testbed.link: error: {error}")
    # Stop as `quit` does: the sockets' files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        with link:
            print(link.address, flush=True)
            if commands:
                threading.Thread(target=_serve_control, args=(link, commands), daemon=True).start()
            # Not sys.stdin: the interpreter's exit would wait for a thread that reads it.
            lines = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115
            threading.Thread(
                target=_serve_lines, args=(link, lines, sys.stdout), daemon=True
            ).start()
            link.wait_closed()
            with _answering:
                pass
    finally:
        if control:
            control.unlink()


if __name__ == "__main__":
    main()
