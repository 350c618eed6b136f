# SPDX-License-Identifier: Apache-2.0
"""What a server that runs can be seen and steered by: the control socket, the metrics.

Most servers have neither, and a guest may be waiting while this module loads. So what they need is
imported where it is asked for; ``tests/test_startup.py`` holds that.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from nbdstream.net.listeners import Listener, close_all
from nbdstream.options import ServeOptions
from nbdstream.service import Service, device_name
from nbdstream.streamer.job import JobStatus
from nbdstream.tasks import start_contained

if TYPE_CHECKING:
    from nbdstream.control.events import Emit
    from nbdstream.control.page import ReportSource

# The logger of events (`nbdstream.cli.log`).
EVENTS = "nbdstream.events"


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
    sinks: list[Emit] = []
    if control is not None or service.opened.seal is not None:
        _start_control(service, nursery, control, options, seen, sinks)
    if logging.getLogger(EVENTS).isEnabledFor(logging.INFO):
        _log_events(service, sinks)
    if sinks:
        from nbdstream.control.events import tell_changes

        def emit(name: str, data: Mapping[str, object]) -> None:
            for sink in sinks:
                sink(name, data)

        nursery.start_soon(
            tell_changes,
            emit,
            service.opened.disk,
            service.opened.holding,
            service.server,
            service.clients_changed,
        )
    if metrics:
        from nbdstream.control.metrics import DiskCollector, metrics_page
        from nbdstream.control.page import live_pages
        from nbdstream.control.web import serve_web

        assert seen is not None
        disk = service.opened.disk
        collector = DiskCollector(
            disk, service.opened.job, service.server.traffic, device_name(disk)
        )
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
    sinks: "list[Emit]",
) -> None:
    """Offer a sealed disk again; serve the control socket."""
    from nbdstream.control import control_server
    from nbdstream.control.exports import ExportCommands
    from nbdstream.control.parameters import Parameters
    from nbdstream.control.traffic import TrafficCommands
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
        device = device_name(disk)
        server = control_server(disk, job, device=device, stop=service.stop, more=more)
        server.table.add(TrafficCommands(service.server.traffic, device))
        server.table.add(ExportCommands(service.server, service.custody, device, server.emit))
        sinks.append(server.emit)
        nursery.start_soon(server.serve, control)


def _log_events(service: Service, sinks: "list[Emit]") -> None:
    """Have the log tell of all events, and of the begin of serving."""
    from nbdstream.cli.log import log_event

    sinks.append(log_event)
    opened = service.opened
    if opened.job is not None:
        opened.job.on_event(log_event)
        if opened.job.status is not JobStatus.NULL:  # it began before there was a listener
            log_event("JOB_STATUS_CHANGE", {"id": opened.job.id, "status": opened.job.status.value})
    log_event("X_NBDSTREAM_SERVING", {"leaf": opened.leaf.path, "uris": service.uris})
