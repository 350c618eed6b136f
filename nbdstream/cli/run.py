# SPDX-License-Identifier: Apache-2.0
"""Running a service from the command line: when it ends, and how.

It ends by a signal, when the command given with --run ends, or, where that was asked
for, when everything is local. The first SIGTERM or SIGINT is a request to finish
what is in flight; the second one ends the process at once, which the leaf survives
as it survives a crash.
"""

import os
import signal
import subprocess
from collections.abc import Callable

import trio

from nbdstream.net.address import UnixAddress
from nbdstream.service import Service

# What a shell reports of a process that a signal ended.
SIGNALLED = 128


async def end_on_signals(
    end: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Call ``end`` at the first signal, end the process at the second."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        ending = False
        async for number in signals:
            if ending:
                os._exit(SIGNALLED + number)
            ending = True
            end()


async def stop_when_complete(service: Service) -> None:
    """Stop the service once everything is local and no client is connected."""
    if service.opened.job is not None:
        await service.opened.job.completed.wait()
    await service.wait_no_clients()
    service.stop()


async def run_command(service: Service, command: str) -> int:
    """Run a shell command against the export, as ``nbdkit --run`` does; return its status.

    It finds the export in the variables ``uri``, ``nbd`` (QEMU's old syntax for the same),
    ``unixsocket`` and ``port``, those that apply.
    """
    listener = service.listeners[0]
    address = listener.address
    variables = {"uri": service.uris[0]}
    if isinstance(address, UnixAddress):
        variables |= {"unixsocket": address.path, "nbd": f"nbd:unix:{address.path}"}
    else:
        variables |= {"port": str(address.port), "nbd": f"nbd:{address}"}
    # The command may read the terminal; it gets SIGINT from there by itself.
    done: subprocess.CompletedProcess[bytes] = await trio.run_process(
        command, shell=True, check=False, stdin=None, env=os.environ | variables
    )
    service.stop()
    return done.returncode if done.returncode >= 0 else SIGNALLED - done.returncode
