# SPDX-License-Identifier: Apache-2.0
"""Ends something at one step of a whole server's tasks: the server, its job, or a client's
connection.

A step is what a task does between two checkpoints, so the cancellation that follows is delivered
at each checkpoint in turn, in the state that all tasks have then.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from nbdstream.errors import NbdstreamError
from nbdstream.service import Service

STOP, ALL, JOB, CLIENT = "stop", "everything", "job", "client"
VICTIMS = (STOP, ALL, JOB, CLIENT)


@dataclass(eq=False)
class Disturber(trio.abc.Instrument):
    """Counts the steps of all tasks while the server is up, and acts at step ``number``.

    ``victim`` is one of `VICTIMS`: the server by SIGTERM, the server by the cancellation of all
    its tasks, the stream job, the connection of a client.
    """

    victim: str = ""
    number: int = -1
    steps: int = 0
    fired: bool = False
    service: Service | None = None
    scope: trio.CancelScope | None = None
    hang_up: list[Callable[[], None]] = field(default_factory=list)  # of each client

    @property
    def ends_server(self) -> bool:
        """Whether the server was told to end here."""
        return self.fired and self.victim in (STOP, ALL)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        # Until then the signal would end this process, and so would it afterwards.
        if self.service is None or signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            return
        number, self.steps = self.steps, self.steps + 1
        if number == self.number and not self.service.stopping.is_set():
            self.fired = True
            self._act(self.service)

    def _act(self, service: Service) -> None:
        if self.victim == STOP:
            signal.raise_signal(signal.SIGTERM)
        elif self.victim == ALL and self.scope is not None:
            self.scope.cancel()
        elif self.victim == CLIENT and self.hang_up:
            self.hang_up[0]()
        elif self.victim == JOB and service.opened.job is not None:
            try:
                service.opened.job.cancel()
            except NbdstreamError:
                pass  # it has ended
