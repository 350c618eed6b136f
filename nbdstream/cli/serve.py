# SPDX-License-Identifier: Apache-2.0
"""serve: the server.

A guest may be waiting while this module loads. So what only some options need (progress, say) is
imported where they ask for it; ``tests/test_startup.py`` holds that.
"""

import gc
import os
import sys
from typing import Any

import click
import trio

from nbdstream.cli.config import config_option
from nbdstream.cli.find import findable
from nbdstream.cli.listening import check_places, listening, refuse_psk, tls_policy
from nbdstream.cli.notify import notify
from nbdstream.cli.options import (
    StoreCommand,
    check_ending,
    prefetch_option,
    speed_option,
    store_option,
    stream_option,
    thin_option,
)
from nbdstream.cli.output import emit, say
from nbdstream.cli.params import (
    DURATION,
    FORMAT,
    FORMAT_HELP,
    LEAF,
    ON_OFF,
)
from nbdstream.cli.places import named_profile, opener_for, profile_store
from nbdstream.cli.run import end_on_signals, run_command, stop_when_complete
from nbdstream.cli.steering import start_steering, steering
from nbdstream.disk import DetectZeroes
from nbdstream.net.listeners import Listener
from nbdstream.options import ServeOptions, check_options
from nbdstream.server.handshake import Tls
from nbdstream.server.server import MAX_CLIENTS
from nbdstream.service import Service, open_service


@click.command(cls=StoreCommand)
@click.argument("leaf", type=LEAF)
@click.option(
    "-b",
    "--backing",
    metavar="URI",
    help="The remote image.  [default: the leaf's own, if it was named here before]",
)
@click.option("-f", "--format", "image_format", type=FORMAT, help=FORMAT_HELP)
@click.option(
    "-U",
    "--unix",
    "socket",
    metavar="SOCKET",
    help="Listen on a Unix socket ('-': a new private one).",
)
@click.option(
    "--listen", metavar="HOST:PORT", help="Listen on TCP.  [default: a private Unix socket]"
)
@click.option(
    "--tls-certificates",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Offer TLS with the server-cert.pem and server-key.pem of this directory.",
)
@click.option(
    "--tls",
    type=click.Choice([mode.value for mode in Tls]),
    help="Whether clients have to use TLS.  [default: require with --tls-certificates]",
)
@click.option("--tls-psk", hidden=True, expose_value=False, callback=refuse_psk)
@click.option(
    "--tls-verify-peer",
    is_flag=True,
    help="Demand client certificates that DIR's ca-cert.pem has signed.",
)
@click.option("-e", "--export", default="", metavar="NAME", help="The export's name.")
@click.option(
    "--description", default="", metavar="TEXT", help="What lists of exports say of the export."
)
@store_option
@thin_option
@click.option("--read-only", is_flag=True, help="Refuse writes and do not change the leaf.")
@click.option(
    "--copy-on-read",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="Store the remote data that guests read.",
)
@stream_option(["on", "off", "paused"])
@speed_option
@click.option(
    "--finish-in",
    type=DURATION,
    help="Stream just fast enough to finish in this time, e.g. 2h; warn if it is too short.",
)
@click.option("--finish-by", type=DURATION, hidden=True)  # the old name, until version 0.2
@prefetch_option
@click.option(
    "--detect-zeroes",
    type=click.Choice([mode.value for mode in DetectZeroes]),
    default="off",
    show_default=True,
    help="Store guest writes of zeroes as zero blocks (on), and free their space too (unmap).",
)
@click.option(
    "--backing-timeout",
    type=DURATION,
    help="Fail reads if the backing is unreachable for this long.  [default: wait without limit]",
)
@click.option(
    "--max-clients",
    type=click.IntRange(min=1),
    default=MAX_CLIENTS,
    show_default=True,
    metavar="N",
    help="Serve at most so many NBD clients at once.",
)
@click.option(
    "--control", metavar="SOCKET", help="Control socket: accept QMP commands on this Unix socket."
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    help="Serve Prometheus metrics, and a live report for browsers, over HTTP.",
)
@click.option(
    "--exit-when-complete",
    is_flag=True,
    help="Exit once the whole disk is local and no client is connected.",
)
@click.option(
    "--pivot",
    "qmp",
    metavar="QMP",
    help="QMP socket of the guest's QEMU: once the disk is local, have it use the leaf, and exit.",
)
@click.option(
    "--keep-backing", is_flag=True, help="Keep the backing's name in the leaf after completion."
)
@click.option(
    "--standby",
    is_flag=True,
    help="Store nothing and refuse writes until activated (used by 'nbdstream migrate').",
)
@click.option(
    "--run",
    "command",
    metavar="COMMAND",
    help="Run a shell command against the export, and exit when it ends.",
)
@click.option(
    "--check", is_flag=True, help="Check the options and the files that they name, and exit."
)
@config_option
def serve(
    leaf: str,
    backing: str | None,
    image_format: str | None,
    socket: str | None,
    listen: str | None,
    tls_certificates: str | None,
    tls: str | None,
    tls_verify_peer: bool,
    export: str,
    description: str,
    store: str | None,
    thin: bool,
    read_only: bool,
    copy_on_read: str,
    stream: str,
    speed: int,
    finish_in: float | None,
    finish_by: float | None,
    prefetch: str,
    detect_zeroes: str,
    backing_timeout: float | None,
    max_clients: int,
    control: str | None,
    metrics: str | None,
    exit_when_complete: bool,
    qmp: str | None,
    keep_backing: bool,
    standby: bool,
    command: str | None,
    check: bool,
) -> None:
    """Serve a leaf image over NBD.

    Data that the leaf does not have is fetched on demand from its backing. A background job
    streams the rest. With -b, a LEAF that does not exist is created, in the format of its
    suffix. The export's NBD URI is printed once the server accepts connections.
    """
    if finish_by is not None:
        say("nbdstream: warning: --finish-by is deprecated: use --finish-in", err=True)
        finish_in = finish_by if finish_in is None else finish_in
    check_ending(exit_when_complete, qmp is not None, read_only=read_only, thin=thin)
    options = ServeOptions(
        leaf=leaf,
        backing=backing,
        format=image_format,
        export=export,
        description=description,
        read_only=read_only,
        copy_on_read=copy_on_read == "on",
        stream=stream,
        speed=speed,
        finish_in=finish_in,
        prefetch=named_profile(prefetch),
        profiles=profile_store(prefetch),
        detect_zeroes=DetectZeroes(detect_zeroes),
        backing_timeout=backing_timeout,
        max_clients=max_clients,
        keep_backing=keep_backing,
        standby=standby,
        tls=tls_policy(tls, tls_certificates, verify_peer=tls_verify_peer),
        thin=thin,
        opener=opener_for(store, leaf, standby=standby, thin=thin, stream=stream),
    )
    if check:
        check_places(socket, listen, metrics)
        check_options(options)
        return
    with listening(leaf, socket, listen, private=command is not None) as listeners:
        with steering(control, metrics) as (control_listener, metrics_listeners):
            status = trio.run(
                lambda: serve_until_done(
                    options,
                    listeners,
                    control=control_listener,
                    metrics=metrics_listeners,
                    exit_when_complete=exit_when_complete,
                    qmp=qmp,
                    command=command,
                )
            )
    sys.exit(status)


async def serve_until_done(
    options: ServeOptions,
    listeners: list[Listener],
    *,
    control: Listener | None,
    metrics: list[Listener],
    exit_when_complete: bool,
    qmp: str | None,
    command: str | None,
) -> int:
    """Serve until something ends it; return the exit status."""
    status = 0
    async with open_service(options, listeners) as service, trio.open_nursery() as nursery:
        await nursery.start(end_on_signals, service.stop)
        with findable(service.opened.leaf, control):
            start_steering(service, nursery, control, metrics, options)
            # What has been loaded so far stays for good. Without this, looking through it for
            # garbage stops all guests for 10 ms now and then.
            gc.freeze()
            notify("READY=1")
            if "NOTIFY_SOCKET" in os.environ:
                from nbdstream.cli.systemd import keep_telling

                nursery.start_soon(keep_telling, service)
            if exit_when_complete:
                nursery.start_soon(stop_when_complete, service)
            if qmp is not None:
                from nbdstream.cli.pivot import pivot_itself
                from nbdstream.pivot.servers import Monitor

                nursery.start_soon(pivot_itself, service, Monitor.at(qmp))
            if command is None:
                # A parent that hands over sockets may write data to the same stdout (nbdcopy).
                if not any(listener.inherited for listener in listeners):
                    for uri in service.uris:
                        emit(uri)
                if sys.stderr.isatty():
                    nursery.start_soon(progress, service)
            else:
                status = await run_command(service, command)
            await service.stopping.wait()
            notify("STOPPING=1", "STATUS=finishing what is in flight")
            await service.finished.wait()
            nursery.cancel_scope.cancel()
    return status


async def progress(service: Service) -> None:
    """Show on stderr how the stream job does, until it ends."""
    from nbdstream.cli.progress import show_progress
    from nbdstream.control.report import statistics

    async def report() -> dict[str, Any]:
        return statistics(service.opened.disk, service.opened.job)

    await show_progress(report)
