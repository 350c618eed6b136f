# SPDX-License-Identifier: Apache-2.0
"""boot: from an NBD URI (or a leaf) to a guest on this terminal, in one command."""

import os
import shlex
import signal
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import trio
from click.core import ParameterSource

from nbdstream.cli.options import (
    StoreCommand,
    prefetch_option,
    speed_option,
    store_option,
    stream_option,
    thin_option,
)
from nbdstream.cli.output import emit, say
from nbdstream.cli.params import (
    FORMAT,
    FORMAT_HELP,
    LEAF,
    SIZE,
)
from nbdstream.cli.places import (
    named_profile,
    opener_for,
    profile_store,
    roomy_directory,
    warn_if_tight,
)
from nbdstream.cli.progress import REDRAW_INTERVAL, Snapshot
from nbdstream.cli.run import SIGNALLED, end_on_signals
from nbdstream.control.report import statistics
from nbdstream.errors import UsageError
from nbdstream.guest.accelerator import probe_accelerator
from nbdstream.guest.disks import Disk
from nbdstream.guest.domain import domain_xml
from nbdstream.guest.qemu import Guest, Machine, run_qemu
from nbdstream.net.listeners import Listener, close_all, listen_unix
from nbdstream.pivot.auto import pivot_when_complete
from nbdstream.pivot.servers import Monitor
from nbdstream.service import ServeOptions, Service, open_service
from nbdstream.tasks import open_background_nursery

DEFAULT_MEMORY = 1 << 30
TEMPORARY_LEAF = "temporary-leaf.qcow2"
# Options that are those of 'serve', too.
_OF_SERVE = ("image_format", "store", "thin", "stream", "speed", "prefetch")


@click.command(cls=StoreCommand)
@click.argument("image", metavar="URI|LEAF")
@click.option(
    "--leaf", type=LEAF, help="Keep the guest's disk in this leaf; create it if it does not exist."
)
@click.option("-f", "--format", "image_format", type=FORMAT, help=FORMAT_HELP)
@store_option
@thin_option
@click.option(
    "-m", "--memory", type=SIZE, default=DEFAULT_MEMORY, help="Guest memory.  [default: 1G]"
)
@stream_option(["on", "off"])
@speed_option
@prefetch_option
@click.option(
    "--pivot/--no-pivot",
    default=True,
    help="Have QEMU use the leaf itself once the disk is local.  [default: pivot]",
)
@click.option(
    "--print-xml",
    is_flag=True,
    help="Start nothing: print the guest as a domain of libvirt, and how to serve its disk.",
)
@click.argument("qemu_arguments", nargs=-1, metavar="[-- QEMU ARGUMENTS]")
def boot(
    image: str,
    leaf: str | None,
    image_format: str | None,
    store: str | None,
    thin: bool,
    memory: int,
    stream: str,
    speed: int,
    prefetch: str,
    pivot: bool,
    print_xml: bool,
    qemu_arguments: tuple[str, ...],
) -> None:
    """Boot a guest from a remote image, or from a leaf, on this terminal.

    The guest's serial console is this terminal: Ctrl-A X ends QEMU, Ctrl-A C opens its
    monitor. The terminal's title shows how much of the disk is local. Without --leaf, the
    leaf of a URI is temporary, and everything the guest writes is lost when it ends. KVM is
    used if a test shows that it runs guests. The exit status is QEMU's.
    """
    if print_xml:
        _print_domain(click.get_current_context(), image, leaf, memory)
        return
    with _images(image, leaf) as (leaf_path, backing, socket), _terminal_restored():
        options = ServeOptions(
            leaf=leaf_path,
            backing=backing,
            format=image_format,
            stream=stream,
            speed=speed,
            prefetch=named_profile(prefetch),
            profiles=profile_store(prefetch),
            thin=thin,
            opener=opener_for(
                store,
                leaf_path,
                temporary=Path(leaf_path).name == TEMPORARY_LEAF,
                thin=thin,
                stream=stream,
            ),
        )
        listener = listen_unix(socket)
        machine = Machine(
            disks=(Disk.nbd(listener.uri()),),
            memory=memory,
            serial="terminal",
            network=True,
            extra=qemu_arguments,
        )
        try:
            status = trio.run(_boot, options, listener, machine, pivot)
        finally:
            close_all([listener])
    sys.exit(status)


def _print_domain(ctx: click.Context, image: str, leaf: str | None, memory: int) -> None:
    """The domain on stdout, and on stderr the command that serves its disk, with the options that
    were given."""
    given = [
        each
        for each in ctx.command.params
        if ctx.get_parameter_source(str(each.name)) is ParameterSource.COMMANDLINE
    ]
    if ctx.params["qemu_arguments"]:
        raise UsageError("--print-xml has no place for QEMU's arguments: add them to the XML")
    if ctx.params["pivot"] and "pivot" in [each.name for each in given]:
        raise UsageError("--print-xml has no --pivot: libvirt has to know of it (docs/pivot.md)")
    with _images(image, leaf) as (path, backing, _):
        if Path(path).name == TEMPORARY_LEAF:
            raise UsageError("--print-xml needs a leaf that stays: name it with --leaf")
        place = Path(path).absolute()
    socket = str(place.with_suffix(".nbd"))
    emit(domain_xml(place.stem, socket, memory, trio.run(probe_accelerator)), nl=False)
    serve = ["nbdstream", "serve", str(place), "-U", socket]
    if backing is not None:
        serve += ["-b", backing]
    for each in given:
        if each.name in _OF_SERVE:
            name, value = each.opts[-1], ctx.params[each.name]
            serve.append(name if value in (True, "") else f"{name}={value}")
    say(f"nbdstream: before the domain starts, serve its disk: {shlex.join(serve)}", err=True)


@contextmanager
def _images(image: str, leaf: str | None) -> Iterator[tuple[str, str | None, Path]]:
    """What to serve: a leaf, its backing where that was named, and a socket to serve it on."""
    with tempfile.TemporaryDirectory(prefix="nbdstream-") as directory:
        socket = Path(directory) / "nbd.sock"
        if os.path.lexists(image):
            if leaf is not None:
                raise UsageError(f"{image} is already a leaf: remove --leaf")
            yield image, None, socket
        elif ":" not in image:
            raise UsageError(f"{image} is neither an existing file nor a URI")
        elif leaf is not None:
            yield leaf, image, socket
        else:
            with roomy_directory() as place:
                yield str(place / TEMPORARY_LEAF), image, socket


@contextmanager
def _terminal_restored() -> Iterator[None]:
    """Leave the terminal as it was, even if QEMU had no chance to."""
    if not sys.stdin.isatty():
        yield
        return
    settings = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


async def _boot(options: ServeOptions, listener: Listener, machine: Machine, pivot: bool) -> int:
    """Serve, run the guest until it ends, stop serving; the exit status. With ``pivot`` serving
    may end before the guest does."""
    async with open_background_nursery() as background:
        closed = trio.Event()
        service: Service = await background.start(_serve, options, listener, closed)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as guest_scope:
                # The guest goes first: QEMU flushes what it has before we stop serving.
                await nursery.start(end_on_signals, guest_scope.cancel)
                async with run_qemu(machine) as guest:
                    if pivot:
                        nursery.start_soon(_pivot, service, guest)
                    if sys.stderr.isatty():
                        nursery.start_soon(_title, service)
                    status = await guest.wait()
            if guest_scope.cancelled_caught:
                status = SIGNALLED + signal.SIGTERM
            service.stop()
            await closed.wait()
            nursery.cancel_scope.cancel()
        say(f"nbdstream: {_words(service)}", err=True)
    return status if status >= 0 else SIGNALLED - status


async def _serve(
    options: ServeOptions,
    listener: Listener,
    closed: trio.Event,
    *,
    task_status: trio.TaskStatus[Service],
) -> None:
    """A task: serve until the service is stopped."""
    async with open_service(options, [listener]) as service:
        if Path(options.leaf).name == TEMPORARY_LEAF:
            warn_if_tight(Path(options.leaf), service.opened.leaf.size)
        task_status.started(service)
        await service.finished.wait()
    closed.set()


async def _pivot(service: Service, guest: Guest) -> None:
    """A task: have the guest go on from the leaf once that is complete. Nothing is served then;
    the terminal is the guest's, so its title says so."""
    monitor = Monitor.of(guest.qmp, guest.process.pid)
    await pivot_when_complete(service, monitor)
    service.stop()


def _words(service: Service) -> str:
    words = str(_snapshot(service))
    gone = service.custody.let_go
    return f"{words}; pivoted, the guest uses its disk without nbdstream" if gone else words


def _snapshot(service: Service) -> Snapshot:
    return Snapshot.of(statistics(service.opened.disk, service.opened.job))


async def _title(service: Service) -> None:
    """Show progress in the terminal's title: the guest has the rest of the screen."""
    while True:
        sys.stderr.write(f"\x1b]0;nbdstream: {_words(service)}\x07")
        sys.stderr.flush()
        await trio.sleep(4 * REDRAW_INTERVAL)
