# SPDX-License-Identifier: Apache-2.0
"""What a server that runs can be seen and steered by: the control socket, the metrics.

Most servers have neither, and a guest may be waiting while this module loads. So what they need is
imported where it is asked for; ``tests/test_startup.py`` holds that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from nbdstream.net.listeners import Listener, close_all
from nbdstream.options import ServeOptions
from nbdstream.service import Service, device_name
from nbdstream.tasks import start_contained

if TYPE_CHECKING:
    from nbdstream.control.page import ReportSource


@contextmanager
def steering(
    control: str | None, metrics: str | None
) -> Iterator[tuple[Listener | None, list[Listener]]]:
    """The control socket's listener and those of the metrics, where they are asked for."""
    listeners: list[Listener] = []
    try:
        control_listener: Listener | None = None
        if control:
            from nbdstream.control import listen_control

            control_listener = listen_control(Path(control))
            listeners.append(control_listener)
        metrics_listeners: list[Listener] = []
        if metrics:
            from nbdstream.control.web import listen_web

            metrics_listeners = listen_web(metrics)
        listeners += metrics_listeners
        yield control_listener, metrics_listeners
    finally:
        close_all(listeners)


def start_steering(
    service: Service,
    nursery: trio.Nursery,
    control: Listener | None,
    metrics: list[Listener],
    options: ServeOptions,
) -> None:
    """Serve the control socket and the metrics until the nursery is cancelled."""
    seen = _start_history(service, nursery, options) if control is not None or metrics else None
    if control is not None or service.opened.seal is not None:
        _start_control(service, nursery, control, options, seen)
    if metrics:
        from nbdstream.control.metrics import DiskCollector, metrics_page
        from nbdstream.control.page import live_pages
        from nbdstream.control.web import serve_web

        assert seen is not None
        disk = service.opened.disk
        collector = DiskCollector(disk, service.opened.job, device_name(disk))
        pages = {"/metrics": metrics_page(collector), **live_pages(seen)}
        nursery.start_soon(serve_web, metrics, pages)


def _start_history(
    service: Service, nursery: trio.Nursery, options: ServeOptions
) -> "ReportSource":
    """Record what the report shows of the disk's past."""
    from nbdstream.control.history import History
    from nbdstream.control.page import ReportSource

    disk, job = service.opened.disk, service.opened.job
    history = History(disk, job)
    start_contained(nursery, "history", disk.health.report, history.run)
    return ReportSource(
        disk, job, device_name(disk), history, lambda: service.server.clients, options.profiles
    )


def _start_control(
    service: Service,
    nursery: trio.Nursery,
    control: Listener | None,
    options: ServeOptions,
    seen: "ReportSource | None",
) -> None:
    """Offer a sealed disk again; serve the control socket."""
    from nbdstream.control import control_server
    from nbdstream.control.events import tell_changes
    from nbdstream.control.exports import ExportCommands
    from nbdstream.control.parameters import Parameters
    from nbdstream.handover.commands import hand_over_commands
    from nbdstream.rebase import RebaseCommand

    disk, job = service.opened.disk, service.opened.job
    hand_over = hand_over_commands(
        disk,
        job,
        nursery,
        device=device_name(disk),
        stream=options.stream,
        seal=service.opened.seal,
        custody=service.custody,
        uris=service.uris,
    )
    if control is not None:
        more = (
            *hand_over,
            seen,
            Parameters(disk, job, service.server),
            RebaseCommand(disk, service.opened.holding, options.opener, device_name(disk)),
        )
        device, held = device_name(disk), service.opened.holding
        server = control_server(disk, job, device=device, stop=service.stop, more=more)
        server.table.add(ExportCommands(service.server, service.custody, device, server.emit))
        clients = service.clients_changed
        nursery.start_soon(tell_changes, server.emit, disk, held, service.server, clients)
        nursery.start_soon(server.serve, control)
