# SPDX-License-Identifier: Apache-2.0
"""The life of a whole server in which faults are injected: `nbdstream serve` in this process,
with two real NBD clients (libnbd), a client of its control socket, and a backing that nbdkit
serves as the server's own helper process, in its sandbox.

The clients are threads: nothing is injected into their calls. Time is real here, so the same
point is about the same moment each time. What a client loses is a connection; it connects again,
and is served. The stop is `quit` on the control socket, if nothing has ended the server before.
"""

import contextlib
import io
import os
import random
import socket as sockets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import nbd
import trio

from nbdstream.cli import serve as serve_module
from nbdstream.control import listen_control
from nbdstream.errors import NbdstreamError, sole_error
from nbdstream.net.listeners import Listener, close_all, listen_unix
from nbdstream.service import ServeOptions, Service, open_service
from testbed.faults.disturber import Disturber
from testbed.faults.helper import killing
from testbed.faults.oracle import CELL, ZERO, Oracle, written_cell
from testbed.faults.scenario import CELLS, drawn_request, stripes
from testbed.faults.shim import SYNCS, Shim
from testbed.peers import PeerError, Qmp

GUESTS = 2
OPERATIONS = 16
# For the whole life, for a guest's way back to the server, for an answer: seconds.
LIFE, PATIENCE, ANSWER = 40.0, 10.0, 20.0
PAUSE = 0.01
SPEED = 256 << 10  # so that the job is at work while the guests are


_thread_cache: Any = trio._core._thread_cache


class _NeverAgain(dict[Any, None]):
    """Idle workers of which none is taken for another job, so that they end by themselves."""

    def popitem(self) -> tuple[Any, None]:
        raise KeyError


def _fresh_threads() -> Any:
    """trio's threads without idle ones: each call of a worker has to start its thread."""
    cache = _thread_cache.ThreadCache()
    cache._idle_workers = _NeverAgain()
    return cache


@dataclass
class Served:
    """One life of one served leaf, and what was seen of it; as `scenario.Life`.

    ``backing``: a path, or what else names it.
    """

    path: Path
    format: str
    shim: Shim
    seed: int
    backing: str
    disturber: Disturber = field(default_factory=Disturber)
    oracle: Oracle = field(default_factory=lambda: Oracle.of_backing(CELLS))
    failed: list[str] = field(default_factory=list)
    stopped_clean: bool = False
    ended_by: BaseException | None = None
    begun: bool = False  # a guest was served
    leaving: bool = False  # the server was told to end
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Live. An error that ends it is in `ended_by`."""
        socket, control = self.path.with_name("nbd"), self.path.with_name("qmp")
        clients = threading.Thread(target=self._be_clients, args=(socket, control))
        fresh = mock.patch.object(_thread_cache, "THREAD_CACHE", _fresh_threads())
        soon = mock.patch.object(_thread_cache, "IDLE_TIMEOUT", PAUSE)
        with self.shim.installed(), killing(self.shim), fresh, soon, self._watched():
            clients.start()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    self._serve(socket, control)
            finally:
                self.shim.armed = False
                self.over.set()
                clients.join()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Show the service to the disturber as long as it is there."""

        @contextlib.asynccontextmanager
        async def opened(*arguments: Any) -> AsyncIterator[Service]:
            async with open_service(*arguments) as service:
                self.disturber.service = service
                yield service

        with mock.patch.object(serve_module, "open_service", opened):
            yield

    def _ends(self) -> bool:
        """Whether the server was told to end."""
        return self.leaving or self.disturber.ends_server

    def _serve(self, socket: Path, control: Path) -> None:
        options = ServeOptions(leaf=str(self.path), backing=self.backing, speed=SPEED)
        listeners: list[Listener] = []
        self.shim.armed = True
        try:
            listeners.append(listen_unix(socket))
            listeners.append(listen_control(control))
            trio.run(
                self._until_done,
                options,
                listeners[0],
                listeners[1],
                instruments=[self.disturber],
            )
            self.stopped_clean = True
        except (OSError, NbdstreamError, ExceptionGroup) as error:
            self.ended_by = sole_error(error)
            if not isinstance(self.ended_by, (OSError, NbdstreamError)):
                self.oracle.broken.append(f"ended by {self.ended_by!r}")
        except BaseException as error:
            self.oracle.broken.append(f"ended by {error!r}")
            self.ended_by = error
        finally:
            self.shim.armed = False
            close_all(listeners)
        if self.begun and not self._ends():
            self.oracle.broken.append(f"guests lost their server: {self.ended_by!r}")

    async def _until_done(self, options: ServeOptions, socket: Listener, control: Listener) -> None:
        with trio.move_on_after(LIFE) as life:
            self.disturber.scope = life
            await serve_module.serve_until_done(
                options,
                [socket],
                control=control,
                metrics=[],
                exit_when_complete=False,
                qmp=None,
                command=None,
            )
        if life.cancelled_caught and not self.disturber.ends_server:
            self.oracle.broken.append(f"the server did not end in {LIFE:g} s")

    def _be_clients(self, socket: Path, control: Path) -> None:
        self.shim.exempt.add(threading.get_ident())
        guests = [_Guest(self, number, socket) for number in range(GUESTS)]
        threads = [threading.Thread(target=self._guarded, args=(each.run,)) for each in guests]
        threads.append(threading.Thread(target=self._guarded, args=(self._steer, control)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not self.disturber.ends_server:
            self._guarded(self._quit, control)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        self.shim.exempt.add(threading.get_ident())
        try:
            work(*arguments)
        except Exception as error:
            if not self.over.is_set() and not self.disturber.ends_server:
                self.oracle.broken.append(f"a client: {error!r}")

    def connected(self, connect: Callable[[], object]) -> None:
        """Call `connect` until it succeeds. Raises what it raises after `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                connect()
            except (nbd.Error, OSError, PeerError):
                if self.over.is_set() or self._ends() or time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE)
            else:
                return

    def _steer(self, control: Path) -> None:
        """Look at the disk and the job, and steer the job, each in a connection of its own."""

        def ask() -> None:
            with Qmp(control, timeout=ANSWER) as qmp:
                for query in ("query-block-jobs", "x-nbdstream-stats", "x-nbdstream-map"):
                    qmp.execute(query)
                with contextlib.suppress(PeerError):  # the job may have ended
                    qmp.execute("block-job-set-speed", device="disk0", speed=SPEED)

        for _ in range(4):
            self.connected(ask)
            time.sleep(0.05)

    def _quit(self, control: Path) -> None:
        def leave() -> None:
            with Qmp(control, timeout=ANSWER) as qmp:
                self.leaving = True
                qmp.execute("quit")

        self.connected(leave)


class _Guest:
    """Changes, reads and flushes cells of its own, and connects again when it has to."""

    def __init__(self, life: Served, number: int, socket: Path) -> None:
        self._life, self._number, self._socket = life, number, socket
        self._oracle = life.oracle
        self._random = random.Random(f"{life.seed} {number}")
        self._serial = 0
        self._stripes = stripes(number, GUESTS)
        self._owned = [cell for stripe in self._stripes for cell in stripe]
        self._nbd = nbd.NBD()
        self._mine = sockets.socket(sockets.AF_UNIX)
        life.disturber.hang_up.append(self.hang_up)

    def run(self) -> None:
        try:
            self._live()
        finally:
            self._mine.close()

    def _live(self) -> None:
        self._life.connected(self._connect)
        for _ in range(OPERATIONS):
            self._request(*drawn_request(self._random, self._stripes))
            time.sleep(self._random.choice([0, 0.01, 0.03]))
        self._request("flush", range(0))
        self._read_all()
        with contextlib.suppress(nbd.Error):
            self._nbd.shutdown()

    def _connect(self) -> None:
        handle = nbd.NBD()
        with sockets.socket(sockets.AF_UNIX) as sock:
            sock.connect(str(self._socket))
            mine = sockets.socket(fileno=os.dup(sock.fileno()))
            try:
                handle.connect_socket(sock.detach())
            except BaseException:
                mine.close()
                raise
        self._mine.close()
        self._nbd, self._mine = handle, mine
        self._life.begun = True

    def hang_up(self) -> None:
        """Lose the connection, whatever is under way on it."""
        with contextlib.suppress(OSError):  # there is none
            self._mine.shutdown(sockets.SHUT_RDWR)

    def _request(self, kind: str, cells: range) -> None:
        """One request; what fails is noted, and the guest goes on, if need be from a new
        connection."""
        needed = self._life.shim.flushes_needed
        try:
            getattr(self, f"_{kind}")(cells)
        except nbd.Error as error:
            if self._life.shim.call not in SYNCS:
                self._life.failed.append(f"{kind}: {error}")
            elif kind != "flush" and (kind == "read" or needed == self._life.shim.flushes_needed):
                self._oracle.broken.append(f"{kind}, which needed no flush: {error}")
            if not self._nbd.aio_is_ready():
                self._life.connected(self._connect)

    def _write(self, cells: range) -> None:
        self._serial += 1
        content = written_cell(self._number, self._serial)
        self._oracle.begin(cells, content)
        self._nbd.pwrite(content * len(cells), cells.start * CELL)
        self._oracle.acknowledge(cells, content)

    def _zero(self, cells: range) -> None:
        self._oracle.begin(cells, ZERO)
        flags = self._random.choice([0, nbd.CMD_FLAG_NO_HOLE])
        self._nbd.zero(len(cells) * CELL, cells.start * CELL, flags)
        self._oracle.acknowledge(cells, ZERO)

    def _trim(self, cells: range) -> None:
        self._oracle.begin(cells, ZERO)  # the old content or zeroes
        self._nbd.trim(len(cells) * CELL, cells.start * CELL)

    def _flush(self, _cells: range) -> None:
        self._nbd.flush()
        self._oracle.flushed(self._owned)

    def _read(self, cells: range) -> None:
        data = self._nbd.pread(len(cells) * CELL, cells.start * CELL)
        self._oracle.check(bytes(data), cells.start, "a guest's read")

    def _read_all(self) -> None:
        """Every request has to succeed now, but for one that meets the fault, or finds that the
        connection met it."""
        for stripe in self._stripes:
            before = self._life.shim.fired
            try:
                self._read(stripe)
            except nbd.Error as error:
                if not self._nbd.aio_is_ready():
                    self._life.failed.append(f"a connection: {error}")
                    self._life.connected(self._connect)
                elif before or not self._life.shim.fired:
                    self._oracle.broken.append(f"a read long after the fault: {error}")
                self._read(stripe)
