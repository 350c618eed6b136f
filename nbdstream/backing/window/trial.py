# SPDX-License-Identifier: Apache-2.0
"""A trial: what a path delivers, and how late, with one window held for about a round trip.

First it waits until nearly all that was in flight when it began has been answered: those
replies show what was tried before. Then it counts everything until a window's worth has been
delivered, and more where the server's times differ. The delay is bytes in flight over
bytes per second (Little's law). A mean of the replies to what was sent within the trial would
leave out the slow ones, which are still to come. That mean (`Trial.own`) is there sooner,
and serves as a lower bound.
"""

from typing import NamedTuple

from nbdstream.backing.window.measures import Row

# What was in flight before has been answered, but for this part: a few replies are very late.
SETTLED_PART = 0.1
# A trial is based on so many replies at the least, and on so many at the most while the mean
# of their delays is known no better than to `ACCURACY` of itself.
REPLIES_LEAST = 8
REPLIES_MOST = 96
ACCURACY = 0.08
# No trial is shorter than this: a few replies that come together are no rate.
LEAST_TIME = 0.01


class Sent(NamedTuple):
    """What to remember of a request until its reply comes (see `Window.sent`).

    ``in_flight``: bytes of all priorities, itself included. ``trial``: the number of the trial
    that was under way.
    """

    time: float
    length: int
    in_flight: int
    background: bool = True
    trial: int = 0


class Trial:
    """One measurement of the window ``size``.

    Attributes:
        size: bytes.
        number: how many trials there were before. It tells which requests are older; their times
            do not, since replies are noticed some time after they came.
        limited: the window was used up.
        over: enough has been seen. Only ever after whole rounds of what was in flight: replies
            come in bursts, and a part of a round says nothing of the rest.
        replies: the delays of background requests that were answered within the trial.
        own: those of them that were sent within it, too.
    """

    def __init__(
        self, number: int, size: int, now: float, in_flight: int, accuracy: float = ACCURACY
    ) -> None:
        """``in_flight``: background bytes under way when it begins."""
        self.number = number
        self.size = size
        self.limited = False
        self.over = False
        self._accuracy = accuracy
        self._old = in_flight
        self._settled_at = SETTLED_PART * in_flight
        self._start: float | None = None if in_flight else now
        self._round = self._next_round = size
        self._last = now
        self._in_flight = in_flight
        self._area = 0.0  # byte-seconds in flight
        self._all_bytes = self._bytes = 0
        self.replies = Row()
        self.own = Row()

    def _advance(self, now: float) -> None:
        # Replies are reported a little after they came, so times may go back a little.
        self._area += self._in_flight * max(now - self._last, 0.0)
        self._last = max(now, self._last)

    def sent(self, now: float, length: int) -> None:
        """A background request went out."""
        self._advance(now)
        self._in_flight += length

    def landed(self, request: Sent, now: float, *, answered: bool, limited: bool) -> None:
        """A request of any priority has ended."""
        self._advance(now)
        if request.background:
            self._in_flight -= request.length
        if answered and request.background and request.trial == self.number:
            self.own.add(now - request.time)
        if self._start is None:
            if request.background and request.trial != self.number:
                self._old -= request.length
                if self._old <= self._settled_at:
                    self._start, self._area = now, 0.0
                    self._round = self._next_round = self._in_flight + request.length
            return
        if not answered:
            return
        self._all_bytes += request.length
        if request.background:
            self.limited = self.limited or limited
            self._bytes += request.length
            self.replies.add(now - request.time)
            if self._bytes >= self._next_round:
                self._next_round += self._round
                self.over = self._is_enough(now - self._start)

    def _is_enough(self, elapsed: float) -> bool:
        if self.replies.count < REPLIES_LEAST or elapsed < LEAST_TIME:
            return False
        return self.replies.count >= REPLIES_MOST or self.error <= self._accuracy * self.delay

    @property
    def delay(self) -> float:
        """Mean seconds from request to reply, by weight of bytes."""
        return self._area / self._bytes if self._bytes else 0.0

    @property
    def spread(self) -> float:
        """Seconds by which the time of one reply differs from the next one's."""
        return self.replies.spread

    @property
    def error(self) -> float:
        """The standard error of `delay`; of `rate`, it is the same part."""
        return self.replies.error

    @property
    def rate(self) -> float:
        """Bytes per second, of every priority."""
        return self._all_bytes / self._elapsed if self._elapsed else 0.0

    @property
    def background_rate(self) -> float:
        """Bytes per second of background reads."""
        return self._bytes / self._elapsed if self._elapsed else 0.0

    @property
    def _elapsed(self) -> float:
        return 0.0 if self._start is None else self._last - self._start
