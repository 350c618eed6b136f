# SPDX-License-Identifier: Apache-2.0
"""What a service is asked for, and whether that makes sense, before anything is opened."""

import os
from dataclasses import dataclass

from nbdstream.backing import BackingOpener, open_backing
from nbdstream.disk import DetectZeroes
from nbdstream.errors import UsageError
from nbdstream.leaf import format_from_suffix
from nbdstream.server.certificates import Certificates, TlsPolicy
from nbdstream.server.constants import MAX_STRING
from nbdstream.server.cursor import string_fault
from nbdstream.server.server import MAX_CLIENTS
from nbdstream.streamer.profile import read_profile
from nbdstream.streamer.profile_store import ProfileStore

NEEDS_BACKING = "{} does not exist; to create it, name its backing (-b URI)"


@dataclass(frozen=True)
class ServeOptions:
    """What `nbdstream.service.open_service` is asked for; ``nbdstream serve --help`` explains each.

    ``format`` of the leaf, None to tell it by `nbdstream.leaf.probe`'s rules;
    ``stream`` is "on", "off" or "paused"; ``speed`` in bytes per second, 0 for no cap;
    ``finish_in`` is in seconds from now, None for no deadline; ``prefetch`` the file of a boot
    profile, ``profiles`` the collection in which one is found and kept otherwise;
    ``backing_timeout`` in seconds, None to wait for a lost backing for ever;
    ``max_clients``: how many NBD clients are served at once;
    ``standby``: the backing may still be written, so keep nothing of it until told; ``tls``: how
    TLS is offered to clients, None for not at all;
    ``thin``: the leaf stays an overlay, and nothing is copied into it;
    ``opener`` opens the backing, as `open_backing` does; ``shared``: many guests read the disk,
    each with a server of its own that records its boot profile, so here none is recorded.
    """

    leaf: str
    backing: str | None = None
    format: str | None = None
    export: str = ""
    description: str = ""
    read_only: bool = False
    copy_on_read: bool = True
    stream: str = "on"
    speed: int = 0
    finish_in: float | None = None
    prefetch: str | None = None
    profiles: ProfileStore | None = None
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    backing_timeout: float | None = None
    max_clients: int = MAX_CLIENTS
    keep_backing: bool = False
    standby: bool = False
    tls: TlsPolicy | None = None
    thin: bool = False
    opener: BackingOpener = open_backing
    shared: bool = False


def check_combination(options: ServeOptions) -> None:
    """Check that options can be used together. Raises UsageError, which names them."""
    for option, text in (
        ("--export", options.export),
        ("--description", options.description),
    ):
        if fault := string_fault(text):
            raise UsageError(f"{option} is {fault}: NBD takes up to {MAX_STRING} bytes of UTF-8")
    if options.prefetch is not None and options.read_only:
        raise UsageError("--prefetch keeps what it fetches: it does not go with --read-only")
    if options.finish_in is not None and options.stream == "off":
        raise UsageError("--finish-in needs a stream job: it cannot be used with --stream off")
    if options.thin:
        _check_thin(options)


def _check_thin(options: ServeOptions) -> None:
    """Raise UsageError for options of what a thin leaf does not have."""
    unfit = {
        "--stream paused": options.stream == "paused",
        "--speed": bool(options.speed),
        "--finish-in": options.finish_in is not None,
    }
    for option in (name for name, given in unfit.items() if given):
        raise UsageError(
            f"{option} is for the leaf's own stream job: it does not go with --thin, where the "
            "store fetches"
        )


def check_options(options: ServeOptions) -> None:
    """Check what can be checked of options while another process may serve the leaf: their
    combination, and the files that they name. The backing is not contacted.

    Raises UsageError, LeafError, ProfileError, OSError.
    """
    check_combination(options)
    if options.tls is not None:
        Certificates(options.tls)
    if options.prefetch is not None:
        read_profile(options.prefetch)
    if os.path.lexists(options.leaf):
        with open(options.leaf, "rb"):
            return
    if options.backing is None:
        raise UsageError(NEEDS_BACKING.format(options.leaf))
    if options.format is None:
        format_from_suffix(options.leaf)
