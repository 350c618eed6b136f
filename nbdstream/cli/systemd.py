# SPDX-License-Identifier: Apache-2.0
"""What systemd hears of a service while it runs: how it does, and that it lives (sd_notify(3)).

The watchdog's signs of life come from the event loop, so they end when it hangs.
"""

import os
from collections.abc import Mapping

import trio

from nbdstream.cli.notify import notify
from nbdstream.cli.progress import Snapshot
from nbdstream.control.report import statistics
from nbdstream.service import Service
from nbdstream.units import format_count

# Seconds between two looks at what there is to say.
STATUS_INTERVAL = 5.0


async def keep_telling(service: Service) -> None:
    """Say how the service does and that it lives, until cancelled."""
    watchdog = watchdog_interval(os.environ)
    interval = min(STATUS_INTERVAL, watchdog or STATUS_INTERVAL)
    told = ""
    while True:
        states = ["WATCHDOG=1"] if watchdog else []
        if (status := _status(service)) != told:
            states.append(status)
            told = status
        if states:
            notify(*states)
        await trio.sleep(interval)


def watchdog_interval(environment: Mapping[str, str]) -> float:
    """Seconds between signs of life: half of what systemd waits for one, as
    sd_watchdog_enabled(3) advises; 0 if it waits for none of this process."""
    lapse = environment.get("WATCHDOG_USEC", "")
    mine = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    return int(lapse) / 2e6 if lapse.isdigit() and mine else 0.0


def _status(service: Service) -> str:
    snapshot = Snapshot.of(statistics(service.opened.disk, service.opened.job))
    clients = format_count(service.server.clients, "client", "clients")
    return "STATUS=" + " ".join(f"{clients}, {snapshot}".split())
