# SPDX-License-Identifier: Apache-2.0
"""The link: a transmitter with a queue in front, then a delay.

Replies wait in one first-in-first-out queue. If the queue is bounded, what does not fit
waits at its sender, and senders (connections) take turns in pieces of `PIECE` bytes, as TCP
connections that share a bottleneck do. Requests are small: they only take half of the delay.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from testbed.paths.events import Events

PIECE = 64 << 10
# What a token bucket lets through while it has tokens, as a multiple of its rate.
BURST_RATE = 5

Deliver = Callable[[], None]


@dataclass(eq=False)
class _Reply:
    """``left``: bytes still at the sender; ``unsent``: bytes not yet transmitted."""

    left: int
    unsent: int
    deliver: Deliver


class Link:
    """One direction of a link, shared by all connections.

    Attributes:
        rate: bytes per second; may be changed while it runs.
        delay: the round trip in seconds; may be changed while it runs.
        carried: bytes transmitted so far.
    """

    def __init__(
        self,
        events: Events,
        rate: float,
        delay: float,
        *,
        queue: float = math.inf,
        burst: int = 0,
    ) -> None:
        """``queue``: bytes that wait in one queue; ``burst``: bytes that a token bucket holds."""
        self.rate, self.delay = rate, delay
        self.carried = 0
        self._events = events
        self._queue = queue
        self._burst = burst
        self._fifo: deque[tuple[int, _Reply]] = deque()
        self._queued = 0
        self._senders: dict[object, deque[_Reply]] = {}
        self._turns: deque[object] = deque()
        self._busy = False
        self._paid_until = -math.inf
        self._stalled_until = 0.0

    def stall(self, seconds: float) -> None:
        """Carry nothing for a while."""
        self._stalled_until = self._events.now + seconds

    @property
    def backlog(self) -> float:
        """Seconds of transmission that wait, at the present rate."""
        waiting = sum(reply.left for sender in self._senders.values() for reply in sender)
        return (self._queued + waiting) / self.rate

    def send(self, sender: object, length: int, deliver: Deliver) -> None:
        """Carry a reply of ``length`` bytes; ``deliver`` is called when it has arrived."""
        reply = _Reply(length, length, deliver)
        if self._queue == math.inf:
            self._fifo.append((length, reply))
            self._queued += length
        else:
            backlog = self._senders.setdefault(sender, deque())
            if not backlog:
                self._turns.append(sender)
            backlog.append(reply)
            self._take_turns()
        if not self._busy:
            self._transmit()

    def _take_turns(self) -> None:
        while self._turns and (self._queued < self._queue or not self._fifo):
            sender = self._turns.popleft()
            backlog = self._senders[sender]
            reply = backlog[0]
            piece = min(PIECE, reply.left)
            reply.left -= piece
            self._fifo.append((piece, reply))
            self._queued += piece
            if reply.left == 0:
                backlog.popleft()
            if backlog:
                self._turns.append(sender)

    def _transmit(self) -> None:
        if not self._fifo:
            self._busy = False
            return
        self._busy = True
        length, _ = self._fifo[0]
        now = self._events.now
        start = max(now, self._stalled_until)
        self._paid_until = max(self._paid_until, start - self._burst / self.rate)
        self._paid_until += length / self.rate
        peak = length / (BURST_RATE * self.rate) if self._burst else 0.0
        self._events.at(max(self._paid_until, start + peak), self._transmitted)

    def _transmitted(self) -> None:
        length, reply = self._fifo.popleft()
        self._queued -= length
        self.carried += length
        reply.unsent -= length
        if reply.unsent == 0:
            self._events.at(self._events.now + self.delay / 2, reply.deliver)
        self._take_turns()
        self._transmit()
