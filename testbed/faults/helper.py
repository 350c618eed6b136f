# SPDX-License-Identifier: Apache-2.0
"""The process that reads the backing is killed: at one of the requests that it gets, while it
starts, or while it is connected to; once, or again as soon as it is back.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from nbdstream.backing import connect as connecting
from nbdstream.backing import connection, helper
from testbed.faults.shim import Shim
from testbed.processes import children

BEFORE, AFTER, AGAIN = "killed-before", "killed-after", "killed-again"
HELPER_FAULTS = {
    "helper-request": (BEFORE, AFTER, AGAIN),
    "helper-start": (AFTER, AGAIN),
    "helper-connect": (BEFORE, AFTER, AGAIN),
}


@contextlib.contextmanager
def killing(shim: Shim) -> Iterator[None]:
    """Kill helpers as ``shim`` says, for the length of the block."""
    again = False

    def kill() -> None:
        for child in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def struck(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal again
            fault = shim.due(kind)
            if fault == BEFORE:
                kill()
            result = real(*arguments, **named)
            if fault in (AFTER, AGAIN) or (again and shim.call == kind):
                again = fault == AGAIN
                kill()
            return result

        return call

    with contextlib.ExitStack() as stack:
        for kind, place, name in (
            ("helper-request", connection.Connection, "_submit"),
            ("helper-start", helper.Helper, "_spawn"),
            ("helper-connect", connecting, "_start"),
        ):
            wrapped = struck(kind, getattr(place, name))
            stack.enter_context(mock.patch.object(place, name, wrapped))
        yield
