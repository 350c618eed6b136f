# SPDX-License-Identifier: Apache-2.0
"""The backing of a disk that is being served moves to another place: the same image at another URI.

The new place is opened and checked first, then the leaf records it, then reads go there. Up to
the last step everything goes on at the old place, and a failure leaves it in use.
"""

import logging
from dataclasses import replace

import trio

from nbdstream.backing import BackingOpener, open_backing, recorded_by_image
from nbdstream.backing.connect import CONNECT_TIMEOUT
from nbdstream.backing.holding import Holding
from nbdstream.backing.identity import fingerprint
from nbdstream.backing.nbd import NbdBacking
from nbdstream.control.table import command
from nbdstream.disk import StreamedDisk
from nbdstream.errors import BackingGoneError, BackingMismatchError, UsageError
from nbdstream.handover.generation import STANDBY, check_generation
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.marks import vouch
from nbdstream.qmp.protocol import DeviceNotFound, JSONObject

log = logging.getLogger(__name__)


class RebaseCommand:
    """Moves the backing of the disk ``device``."""

    def __init__(
        self, disk: StreamedDisk, holding: Holding, opener: BackingOpener, device: str
    ) -> None:
        self._disk = disk
        self._holding = holding
        self._opener = opener
        self._device = device

    @command("x-nbdstream-rebase")
    async def rebase(self, device: str, uri: str) -> JSONObject:
        """Read the backing from ``uri`` from now on; returns it as it was recorded.

        Raises:
            DeviceNotFound: no disk has this name.
            UsageError: this backing cannot move, or the URI is none.
            BackingError: the new place cannot be opened, or has another image.
            LeafError, OSError: the new place cannot be recorded in the leaf.
        """
        if device != self._device:
            raise DeviceNotFound(f"Cannot find device='{device}'")
        known = self._movable()
        check_generation(known.uri, uri)
        old = self._holding.backing
        opening = self._opener(uri, timeout=old.timeout if old is not None else None)
        await self._holding.move(opening, self._accept)
        disk, new = self._disk, self._holding.backing
        assert new is not None
        if disk.backing is not None:
            disk.backing.uri = new.uri  # the disk's may be a longer one around it
        log.info("the backing is read from %s from now on", new.uri)
        return {"uri": new.uri}

    def _movable(self) -> BackingReference:
        """What the leaf knows of its backing. Raises UsageError if that cannot move."""
        disk = self._disk
        known = disk.leaf.backing
        if disk.backing is None or known is None:
            raise UsageError("the disk has no backing: everything is local")
        if disk.gate.let_go or disk.gate.standing_by or known.identity == STANDBY:
            raise UsageError(disk.gate.reason or "the disk stands by")
        if self._opener is not open_backing:
            raise UsageError(
                "the backing is read by way of the image store: serve the leaf without --store, "
                "or name another place with 'nbdstream serve -b'"
            )
        if not known.identity:
            raise UsageError(
                "the leaf does not know its backing's identity: serve it writable once"
            )
        return known

    async def _accept(self, backing: NbdBacking) -> None:
        """Check that it is the same image, and record where. Raises BackingError, LeafError,
        OSError."""
        old = self._holding.backing
        known = self._movable()
        assert old is not None
        if backing.size != old.size:
            raise BackingMismatchError(
                f"{backing.uri}: has {backing.size} bytes, and the leaf's backing {old.size}"
            )
        identity = await _fingerprint(backing)
        if identity != known.identity:
            raise BackingMismatchError(
                f"{backing.uri}: its content is not that of the image that the leaf belongs to "
                f"(fingerprint {identity[:14]}…, expected {known.identity[:14]}…)"
            )
        backing.expect(identity)
        leaf = self._disk.leaf
        if leaf.read_only:
            return
        # As for a new leaf: only qcow2 has room for a format, and QEMU understands it there.
        named = recorded_by_image(backing.uri) if leaf.format == "qcow2" else (backing.uri, "raw")
        wanted = replace(known, uri=named[0], format=named[1])
        await self._disk.record_backing(wanted)
        vouch(leaf.fd, wanted)


async def _fingerprint(backing: NbdBacking) -> str:
    with trio.move_on_after(CONNECT_TIMEOUT):
        return backing.known_identity or await fingerprint(backing)
    raise BackingGoneError(f"{backing.uri}: no answer in {CONNECT_TIMEOUT:g} s")
