# SPDX-License-Identifier: Apache-2.0
"""The process of an image in use: its leaf, served to guests' servers on a socket in the store.

It ends when no client has been connected for a while and nothing is being pulled. Ending loses
nothing, and neither does being killed: what was flushed of the leaf stays, the rest is fetched
again, and guests' servers start another process and ask once more.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import trio

from nbdstream.backing import open_backing
from nbdstream.control import control_server, listen_control
from nbdstream.disk import StreamedDisk
from nbdstream.leaf.locking import stop_writing
from nbdstream.leaf.raw.leaf import RawLeaf
from nbdstream.net.listeners import Listener, close_all, listen_unix
from nbdstream.server.server import Server
from nbdstream.service import ServeOptions, device_name, open_stream
from nbdstream.store.exports import image_exports
from nbdstream.store.layout import Image, Store
from nbdstream.store.live import LiveMap
from nbdstream.store.locks import acquire
from nbdstream.store.upkeep import make_room
from nbdstream.streamer.job import ACTIVE, StreamJob
from nbdstream.streamer.room import Space
from nbdstream.tasks import in_worker, start_contained

log = logging.getLogger(__name__)

# Seconds without a client after which the process ends.
IDLE_TIME = 60.0
# Seconds for which a predecessor may still be closing the leaf.
PREDECESSOR_TIME = 20.0
# Seconds after which a read that the far end does not answer fails here. The guest's server
# asks again, for as long as it was told to.
BACKING_TIMEOUT = 30.0
# Seconds between two looks at whether images should make room.
EVICTION_INTERVAL = 5.0
# Each guest's server has a connection for demand and one for each background class it uses.
CLIENTS_MOST = 4096
SOCKET_MODE = 0o600


async def serve_image(
    image: Image,
    uri: str,
    *,
    idle_time: float = IDLE_TIME,
    ready: Callable[[], None],
    stop: trio.Event,
) -> None:
    """Serve an image until it is unused, or ``stop`` is set; ``ready`` is called once clients can
    connect.

    Raises:
        StoreError: another process serves it.
        NbdstreamError, OSError: the leaf cannot be opened, or the socket not be made.
    """
    lock = await in_worker(lambda: acquire(image.serving, timeout=PREDECESSOR_TIME))
    with lock:
        complete = image.complete
        options = ServeOptions(
            leaf=str(image.leaf),
            backing=None if complete else uri,
            format="raw",
            export=image.id,
            read_only=complete,
            stream="on" if image.pull.exists() else "off",
            backing_timeout=BACKING_TIMEOUT,
            opener=partial(open_backing, later=True),
            shared=True,
        )
        with ExitStack() as after_the_leaf:
            async with open_stream(options) as opened:
                if isinstance(opened.leaf, RawLeaf) and not complete:
                    # Here in the loop: no task of the disk has run so far.
                    after_the_leaf.callback(LiveMap(image, opened.leaf).close)
                with _listening(image) as (listener, control):
                    process = _Process(image, opened.disk, opened.job)
                    await process.run(listener, control, idle_time, ready, stop)


@contextmanager
def _listening(image: Image) -> Iterator[tuple[Listener, Listener]]:
    """The image's two sockets. What is there is a dead process's: we hold the lock."""
    listeners: list[Listener] = []
    try:
        image.control.unlink(missing_ok=True)
        listeners.append(listen_control(image.control))
        image.socket.unlink(missing_ok=True)
        listeners.append(listen_unix(image.socket, mode=SOCKET_MODE))
        yield listeners[1], listeners[0]
    finally:
        close_all(listeners)


class _Process:
    """One image being served."""

    def __init__(self, image: Image, disk: StreamedDisk, job: StreamJob | None) -> None:
        self._image = image
        self._disk = disk
        self._job = job
        self._changed = trio.lowlevel.ParkingLot()
        self._space = Space(lambda: disk.leaf.fd)
        self._server = Server(
            image_exports(disk, image.record.identity, self._space),
            clients_changed=lambda _count: self._wake(),
            max_clients=CLIENTS_MOST,
        )
        if job is not None:
            job.on_event(lambda _name, _data: self._wake())

    def _wake(self) -> None:
        self._changed.unpark_all()

    @property
    def _in_use(self) -> bool:
        pulling = self._job is not None and self._job.status in ACTIVE
        return bool(self._server.clients) or pulling

    async def run(
        self,
        listener: Listener,
        control: Listener,
        idle_time: float,
        ready: Callable[[], None],
        stop: trio.Event,
    ) -> None:
        """Serve until it is time to end."""
        device = device_name(self._disk)
        qmp = control_server(self._disk, self._job, device=device, stop=stop.set)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qmp.serve, control)
            nursery.start_soon(self._end_when_unused, idle_time)
            nursery.start_soon(self._end_when_told, stop)
            nursery.start_soon(self._note_completion)
            start_contained(nursery, "free space", self._disk.health.report, self._keep_space)
            ready()
            await self._server.run([listener])
            nursery.cancel_scope.cancel()

    async def _end_when_unused(self, idle_time: float) -> None:
        while True:
            while self._in_use:
                await self._changed.park()
            with trio.move_on_after(idle_time) as waiting:
                await self._changed.park()
            if waiting.cancelled_caught and not self._in_use:
                log.info("image %s is not used any more", self._image.id)
                self._server.stop()
                return

    async def _end_when_told(self, stop: trio.Event) -> None:
        await stop.wait()
        self._server.stop()

    async def _keep_space(self) -> None:
        """Remove images that have no user while there is little space. A pause of what is pulled
        comes later, and a guest that cannot write comes last."""
        while True:
            await trio.sleep(EVICTION_INTERVAL)
            if self._space.low:
                store = await in_worker(Store, self._image.directory.parent.parent)
                await make_room(store, self._space, self._image)

    async def _note_completion(self) -> None:
        """Once all is local there is nothing left to pull, or to write: QEMU may have the image as
        the backing file of a guest's overlay, and refuses one that another process may write."""
        if self._disk.backing is not None:
            await self._disk.completed.wait()
            stop_writing(self._disk.leaf.fd)
        await in_worker(lambda: self._image.pull.unlink(missing_ok=True))
