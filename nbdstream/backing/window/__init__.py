# SPDX-License-Identifier: Apache-2.0
"""How many bytes of background reads may be in flight: a controller that experiments.

Pure arithmetic: no I/O, no clock. It is told when requests are sent and answered, and
answers with `Window.size` and `Window.unit`. ``docs/streaming.md`` says why it is built so,
and from what sources.

controller  the window: counts what is in flight, hands replies to the state it is in
course      the states, and what they share
starting    start-up
steady      follows what was measured; decides when to experiment
draining    the experiment with less in flight
probing     the experiment with more in flight, or in other units
path        what is known of the path, and which window and unit fit it
demand      what a guest's reads take, and whether an experiment hurts them
trial       one measurement, with a window held
measures    the least of a span of time, the best rate

**What it wants.** While no guest misses: bytes per second. While one does: that its reads
take hardly longer than they would without background work. Both are measured, in trials:
a window is held for about a round trip, and what was delivered then, and how late, is
compared with what another window gave.

**A delay is a hint.** A late reply may mean a queue that this window has made, or
another's queue, a slow disk, an object store's mood. Only an experiment tells: with less in
flight, a queue of ours is shorter, and nothing else is. So delay never lowers the window;
it starts an experiment, and what the experiment costs in rate without a gain in delay is
taken back.

**Sharing.** Flows that fill one queue see the same delay, and each is at rest where its
target is that delay. The target falls with the flow's own rate (as one over its square
root), so they are all at rest only at equal rates. Experiments at random times let each
see the path without the others' queues.
"""

from nbdstream.backing.window.controller import Window
from nbdstream.backing.window.course import State
from nbdstream.backing.window.path import (
    UNIT_LEAST,
    UNIT_MOST,
    WINDOW_FIRST,
    WINDOW_LEAST,
    WINDOW_MOST,
)
from nbdstream.backing.window.trial import Sent

__all__ = [
    "UNIT_LEAST",
    "UNIT_MOST",
    "WINDOW_FIRST",
    "WINDOW_LEAST",
    "WINDOW_MOST",
    "Sent",
    "State",
    "Window",
]
