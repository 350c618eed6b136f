# SPDX-License-Identifier: Apache-2.0
"""Tells a service manager how far the process is (sd_notify(3))."""

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(*states: str) -> None:
    """Send states such as ``READY=1``; nothing if no service manager waits for them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(states).encode(), address)
    except OSError as error:
        log.warning("cannot notify the service manager: %s", error)
