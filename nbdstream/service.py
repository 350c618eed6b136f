# SPDX-License-Identifier: Apache-2.0
"""Everything that serves one leaf, put together: leaf, backing, disk, job, server.

The order matters twice. On the way up, whatever can fail for a reason that the user can
mend (a socket in use, a backing that is not there, or another one than the leaf's) comes
before anything is created or changed. On the way down, clients first: what they have in
flight is finished, then the disk is flushed, then the leaf closed clean.
"""

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from nbdstream.backing import (
    named_by_image,
    open_backing,
    recorded_by_image,
    runs_program,
)
from nbdstream.backing.base import Backing
from nbdstream.backing.holding import Holding, holding
from nbdstream.backing.identity import fingerprint
from nbdstream.backing.padded import PaddedBacking
from nbdstream.disk import StreamedDisk, open_disk, round_off
from nbdstream.disk.readonly import ReadOnlyExport
from nbdstream.errors import UsageError
from nbdstream.export import Export
from nbdstream.handover.custody import Custody
from nbdstream.handover.generation import STANDBY, check_generation
from nbdstream.handover.seal import HOLD, Seal, read_seal
from nbdstream.health import Health
from nbdstream.leaf import create_leaf, format_from_suffix, open_leaf
from nbdstream.leaf.base import BackingReference, Leaf
from nbdstream.leaf.marks import is_vouched_for, vouch
from nbdstream.net.listeners import Listener
from nbdstream.options import NEEDS_BACKING, check_combination
from nbdstream.options import ServeOptions as ServeOptions
from nbdstream.server.certificates import Certificates, TlsPolicy
from nbdstream.server.server import Server
from nbdstream.streamer.automatic import prefetch
from nbdstream.streamer.job import StreamJob
from nbdstream.streamer.profile import read_profile
from nbdstream.streamer.recorder import record_boot
from nbdstream.streamer.room import Space, leave_room
from nbdstream.tasks import in_worker, start_contained, surely

log = logging.getLogger(__name__)


@dataclass
class Opened:
    """A leaf that is ready for use. ``job`` is None where there is nothing to stream;
    ``seal`` is set if the disk was handed over: no guest writes it any more; ``holding`` keeps
    the backing open."""

    leaf: Leaf
    disk: StreamedDisk
    job: StreamJob | None
    seal: Seal | None
    holding: Holding


@dataclass
class Service:
    """A leaf being served; ``stopping`` is set by `stop`, ``finished`` once all clients are gone
    after it."""

    opened: Opened
    server: Server
    listeners: Sequence[Listener]
    clients_changed: trio.lowlevel.ParkingLot
    custody: Custody
    tls: TlsPolicy | None = None
    stopping: trio.Event = field(default_factory=trio.Event)
    finished: trio.Event = field(default_factory=trio.Event)

    @property
    def uris(self) -> list[str]:
        """Where clients find the export."""
        secure = self.tls is not None and self.tls.required
        name = self.opened.disk.name
        return [listener.uri(name, tls=secure) for listener in self.listeners]

    async def wait_no_clients(self) -> None:
        """Return when no client is connected (there may never have been one)."""
        while self.server.clients:
            await self.clients_changed.park()

    def stop(self) -> None:
        """Begin a clean end: no new clients, finish what is in flight."""
        self.stopping.set()
        self.server.stop()


async def describe_backing(uri: str, leaf_format: str) -> BackingReference:
    """Contact a backing and return what a new leaf must record of it. Raises BackingError."""
    async with open_backing(uri) as backing:
        return await _reference(backing, leaf_format)


async def _reference(backing: Backing, leaf_format: str) -> BackingReference:
    identity = backing.known_identity or await fingerprint(backing)
    # QED has no room for any format but raw, and QEMU does not read our raw leaves' maps.
    named = recorded_by_image(backing.uri) if leaf_format == "qcow2" else (backing.uri, "raw")
    return BackingReference(*named, backing.size, identity)


@asynccontextmanager
async def open_stream(options: ServeOptions) -> AsyncIterator[Opened]:
    """Open a leaf with its backing, and run its stream job. A leaf that does not exist is
    created.

    Raises what opening leaf and backing raises (NbdstreamError, OSError).
    """
    check_combination(options)
    profile = read_profile(options.prefetch) if options.prefetch is not None else None
    seal = read_seal(options.leaf)
    if seal is not None and seal.stamp:
        options = replace(options, read_only=True)
    store = None if options.standby or options.read_only else options.profiles
    health = Health()
    leaf_format = seal.format if seal is not None else ""
    async with (
        holding(health.report) as held,
        _open_images(options, leaf_format, held) as (leaf, backing),
    ):
        async with open_disk(
            leaf,
            backing,
            copy_on_read=options.copy_on_read,
            thin=options.thin,
            detect_zeroes=options.detect_zeroes,
            health=health,
        ) as disk:
            disk.name, disk.description = options.export, options.description
            if options.standby:
                disk.stand_by()
            if seal is not None:
                log.warning("%s is %s: no guest changes it here", options.leaf, seal.reason)
                await disk.freeze(seal.reason, hold=HOLD)
            job = _job(options, disk)
            async with trio.open_nursery() as nursery:
                tasks: list[tuple[str, Callable[[], Awaitable[None]]]] = []
                if job is not None:
                    space = Space(lambda: disk.leaf.fd)
                    tasks += [
                        ("stream job", job.run),
                        ("deadline", job.deadline.run),
                        ("free space", partial(leave_room, job, space, options.leaf)),
                    ]
                tasks.append(("prefetch", partial(prefetch, disk, profile, store)))
                if not options.shared:
                    tasks.append(("boot profile", partial(record_boot, disk, store)))
                for name, task in tasks:
                    start_contained(nursery, name, health.report, task)
                nursery.start_soon(_let_go_when_local, disk, held)
                yield Opened(leaf, disk, job, seal, held)
                nursery.cancel_scope.cancel()
            if not options.thin:
                await round_off(disk)


@asynccontextmanager
async def open_service(
    options: ServeOptions,
    listeners: Sequence[Listener],
) -> AsyncIterator[Service]:
    """Serve a leaf on listeners, which accept connections already and get closed.

    The body runs while clients are served; for a clean end it calls `Service.stop` and
    waits for ``finished`` before it is left. Raises as `open_stream` does.
    """
    certificates = Certificates(options.tls) if options.tls is not None else None
    async with open_stream(options) as opened, trio.open_nursery() as nursery:
        clients = trio.lowlevel.ParkingLot()

        def clients_changed(_count: int) -> None:
            clients.unpark_all()

        custody = Custody(opened.disk, nursery, opened.job)
        export: Export = custody
        # A QEMU that had the disk before the server ended may connect again, to have its guest go
        # on once the seal is off. From an export that has become read-only it dies of an
        # assertion (version 7.2). So the guest's writes wait, as in the process that sealed.
        if opened.seal is not None and opened.leaf.read_only:
            export = ReadOnlyExport(export, export.name, opened.seal.reason)
        server = Server(
            [export],
            tls=certificates,
            clients_changed=clients_changed,
            max_clients=options.max_clients,
        )
        service = Service(opened, server, listeners, clients, custody, options.tls)
        nursery.start_soon(_serve, service)
        yield service
        nursery.cancel_scope.cancel()


async def _serve(service: Service) -> None:
    try:
        await service.server.run(service.listeners)
    finally:
        service.finished.set()


def device_name(disk: StreamedDisk) -> str:
    """By what name the control socket knows a disk and, as QEMU does, the job on it."""
    return disk.name or "disk0"


def _job(options: ServeOptions, disk: StreamedDisk) -> StreamJob | None:
    if disk.backing is None or disk.read_only or disk.thin:
        return None
    job = StreamJob(disk, job_id=device_name(disk), keep_backing=options.keep_backing)
    job.set_speed(options.speed)
    job.deadline.set(options.finish_in)
    if options.stream != "off" and not options.standby:
        job.start(paused=options.stream == "paused")
    return job


async def _let_go_when_local(disk: StreamedDisk, held: Holding) -> None:
    """Hang up on the backing, and end its helper, once they are not needed any more."""
    await disk.completed.wait()
    held.let_go()


@asynccontextmanager
async def _open_images(
    options: ServeOptions, image_format: str, held: Holding
) -> AsyncIterator[tuple[Leaf, Backing | None]]:
    """Open the leaf and the backing that belongs to it; check that they do (invariant 6).
    ``held`` keeps the backing open. ``image_format``: what the leaf is, if that is known for
    certain, or ""."""
    exists = os.path.lexists(options.leaf)  # noqa: ASYNC240 - no client is served yet
    if not exists and options.backing is None:
        raise UsageError(NEEDS_BACKING.format(options.leaf))
    if exists:
        async with _open_leaf(options, image_format) as leaf:
            if leaf.backing is None:
                if options.backing is not None:
                    log.warning("%s is wholly local: the backing is not used", leaf.path)
                yield leaf, None
                return
            known = leaf.backing
            uri = options.backing or _trusted(leaf, known)
            _check_hand_over(options, known, uri)
            opening = options.opener(
                uri,
                timeout=options.backing_timeout,
                size=known.size,
                identity="" if options.standby else known.identity,
            )
            backing = await held.open(opening)
            if not options.standby:
                await _record(leaf, backing)
                if options.backing is not None or leaf.backing != known:
                    _remember(leaf, backing)
            yield leaf, _fitted(backing, leaf)
        return
    assert options.backing is not None
    leaf_format = options.format or format_from_suffix(options.leaf)
    opening = options.opener(options.backing, timeout=options.backing_timeout)
    backing = await held.open(opening)
    if options.standby:
        reference = BackingReference(backing.uri, "raw", backing.size, STANDBY)
    else:
        reference = await _reference(backing, leaf_format)
        backing.expect(reference.identity)
    create_leaf(
        options.leaf,
        format=leaf_format,
        size=backing.size,
        cluster_size=None,
        backing=reference,
    )
    async with _open_leaf(options, leaf_format) as leaf:
        yield leaf, _fitted(backing, leaf)


def _trusted(leaf: Leaf, known: BackingReference) -> str:
    """The URI of the backing that a leaf names, if its owner has named that before.

    The author of the image could name any file or address (invariant 13). Raises UsageError.
    """
    uri = named_by_image(leaf.path, known.uri, known.format)
    if runs_program(uri):
        raise UsageError(f"{leaf.path}: the backing {uri} runs a program: name it with -b")
    if not is_vouched_for(leaf.fd, known):
        raise UsageError(
            f"{leaf.path} names the backing {known.uri}, and no user has confirmed that: "
            f"if it is the right one, name it with -b {uri}"
        )
    return uri


def _remember(leaf: Leaf, backing: Backing) -> None:
    """Remember that the leaf's owner has named its backing, or one that led to it, if the leaf
    records just that."""
    known = leaf.backing
    if leaf.read_only or known is None or not known.format:
        return
    if named_by_image(leaf.path, known.uri, known.format) == backing.uri:
        vouch(leaf.fd, known)


def _check_hand_over(options: ServeOptions, known: BackingReference, uri: str) -> None:
    """A leaf that stands by is no disk yet, and one that was handed a generation of its
    source stays with it. Raises UsageError, BackingMismatchError."""
    if options.standby and known.identity != STANDBY:
        raise UsageError(f"{options.leaf} is a disk already: only a new leaf can stand by")
    if known.identity == STANDBY and not options.standby:
        raise UsageError(
            f"{options.leaf} only stood by for {known.uri}, which never handed over: the disk "
            "is still there; delete this leaf"
        )
    check_generation(known.uri, uri)


@asynccontextmanager
async def _open_leaf(options: ServeOptions, image_format: str) -> AsyncIterator[Leaf]:
    """Open and lock the leaf; close it clean at the end, whatever happens."""
    leaf = await in_worker(
        lambda: open_leaf(
            options.leaf,
            read_only=options.read_only,
            format=options.format or image_format or None,
        )
    )
    try:
        yield leaf
    finally:
        await surely(leaf.close)


def _fitted(backing: Backing, leaf: Leaf) -> Backing:
    """The backing, made as long as the leaf if it is shorter."""
    return PaddedBacking(backing, leaf.size) if backing.size < leaf.size else backing


async def _record(leaf: Leaf, backing: Backing) -> None:
    """Record in the leaf what it does not know yet of its backing: where it is now, and,
    of a leaf that another tool has made, which one it is. Raises BackingError, OSError."""
    known = leaf.backing
    assert known is not None
    wanted = replace(known, uri=backing.uri) if known.format == "raw" else known
    if not known.identity:
        found = await _reference(backing, leaf.format)
        wanted = replace(wanted, size=found.size, identity=found.identity)
    if wanted != known and not leaf.read_only:
        await in_worker(leaf.record_backing, wanted)
