# SPDX-License-Identifier: Apache-2.0
"""nbdkit's Python plugin over the streamed disk: nbdstream behind nbdkit's front end.

    nbdkit python plugins/nbdstream_plugin.py leaf=disk.qcow2 backing=nbd://far/image

For those who want nbdkit's filters, its TLS with pre-shared keys, or ``nbdkit --run``.
It holds no policy: every callback hands its request to the same disk that ``nbdstream
serve`` serves.

**Threads.** nbdkit calls from many threads at once; the disk belongs to one event loop,
which runs in a thread of its own (started in ``after_fork``: threads do not survive the
fork). Callbacks hand their request over and wait. The one exception is a read that
is answered from memory: looking up where data lies changes nothing, so it is done
where it is asked for (`StreamedDisk.read_from_any_thread`), without two thread switches.
Python lets one thread run at a time whatever nbdkit does: ``-t 2`` or so is fastest
for local data, while each miss that should not hold up others needs a thread.
"""

import errno
import logging
import site
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import nbdkit  # provided by nbdkit itself

try:
    import nbdstream.service
except ImportError:
    # From a checkout: nbdkit embeds the system's Python, which knows no virtual environment.
    _top = Path(__file__).resolve().parent.parent
    _system = sys.path[:]
    for _directory in (_top / ".venv/lib").glob("python3*/site-packages"):
        site.addsitedir(str(_directory))
    # Before the system's packages, which may be too old for those of the environment.
    sys.path[:] = [str(_top), *(path for path in sys.path if path not in _system), *_system]
    import nbdstream.service

import trio

from nbdstream.disk import DetectZeroes, StreamedDisk
from nbdstream.errors import NbdstreamError, sole_error
from nbdstream.export import Hit
from nbdstream.leaf import FORMATS
from nbdstream.service import ServeOptions
from nbdstream.units import parse_duration, parse_rate

API_VERSION = 2

T = TypeVar("T")

# What each parameter means is said by `nbdstream serve --help`, option by option.
_PARAMETERS: dict[str, Callable[[str], object]] = {
    "leaf": str,
    "backing": str,
    "format": lambda text: _choice(text, *FORMATS),
    "copy_on_read": lambda text: _choice(text, "on", "off") == "on",
    "stream": lambda text: _choice(text, "on", "off", "paused"),
    "speed": parse_rate,
    "detect_zeroes": DetectZeroes,
    "backing_timeout": parse_duration,
    "keep_backing": lambda text: _choice(text, "on", "off") == "on",
}

_config: dict[str, Any] = {}


def _choice(text: str, *allowed: str) -> str:
    if text not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}")
    return text


class _Loop:
    """The event loop's thread, and the disk in it."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._end: trio.Event | None = None
        self._thread = threading.Thread(target=self._main, name="nbdstream")
        self.disk: StreamedDisk | None = None

    def start(self) -> None:
        """Start the thread; return once the disk is open. Raises what opening raised."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except* (NbdstreamError, OSError) as group:
            self._failure = sole_error(group)
            if self._ready.is_set():
                nbdkit.debug(f"nbdstream: {self._failure}")
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._end = trio.Event()
        async with nbdstream.service.open_stream(self._options) as opened:
            self.disk = opened.disk
            self._ready.set()
            await self._end.wait()

    def call(self, work: Callable[..., Awaitable[T]], *args: object, **kwargs: object) -> T:
        """From any other thread: have the loop do it, wait, return or raise what it does."""

        async def run() -> T:
            return await work(*args, **kwargs)

        return trio.from_thread.run(run, trio_token=self._token)

    def stop(self) -> None:
        """Flush, close the leaf clean, end the thread."""
        if self._thread.is_alive() and self._token is not None and self._end is not None:
            trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join()


_loop: _Loop


def _disk() -> StreamedDisk:
    assert _loop.disk is not None
    return _loop.disk


def _call(work: Callable[..., Awaitable[T]], *args: object, **kwargs: object) -> T:
    """Call the disk; make nbdkit answer with the errno that the server would answer with."""
    try:
        return _loop.call(work, *args, **kwargs)
    except OSError as error:
        nbdkit.set_error(error.errno or errno.EIO)
        raise
    except NbdstreamError:
        nbdkit.set_error(errno.EIO)
        raise


# -- nbdkit's callbacks, in the order of a plugin's life ---------------------------------


def thread_model() -> int:
    """Requests may come from any thread, any number at once."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """One parameter of the command line."""
    if key not in _PARAMETERS:
        raise RuntimeError(f"unknown parameter '{key}'; there are: {', '.join(_PARAMETERS)}")
    try:
        _config[key] = _PARAMETERS[key](value)
    except (ValueError, NbdstreamError) as error:
        raise RuntimeError(f"{key}={value}: {error}") from error


def config_complete() -> None:
    """All parameters have been given."""
    if "leaf" not in _config:
        raise RuntimeError("the parameter leaf=FILE is missing")


def after_fork() -> None:
    """nbdkit runs in its final process: threads may be started."""
    global _loop
    logging.basicConfig(format="nbdstream: %(levelname)s: %(message)s")
    _loop = _Loop(ServeOptions(**_config))
    _loop.start()


def cleanup() -> None:
    """No client is left and none will come."""
    _loop.stop()


def open(readonly: bool) -> bool:  # noqa: A001 - nbdkit's name
    """A client; its handle is whether it may write."""
    return not readonly


def get_size(_handle: bool) -> int:
    """Bytes."""
    return _disk().size


def block_size(_handle: bool) -> tuple[int, int, int]:
    """Minimum, preferred, maximum."""
    return (1, _disk().preferred_block_size, 0xFFFFFFFF)


def can_write(handle: bool) -> bool:
    return handle and not _disk().read_only


def can_flush(_handle: bool) -> bool:
    return True


def can_trim(_handle: bool) -> bool:
    return True


def can_zero(_handle: bool) -> bool:
    return True


def can_fast_zero(_handle: bool) -> bool:
    return True


def can_fua(_handle: bool) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_cache(_handle: bool) -> int:
    return int(nbdkit.CACHE_NATIVE)


def can_multi_conn(_handle: bool) -> bool:
    return True


def can_extents(_handle: bool) -> bool:
    return True


def pread(_handle: bool, buffer: bytearray, offset: int, _flags: int) -> None:
    view = memoryview(buffer)
    hit = _disk().read_from_any_thread(view, offset)
    if hit is Hit.MISS:
        _call(_disk().read, view, offset)
    elif hit is Hit.ZERO:
        view[:] = bytes(len(view))


def pwrite(_handle: bool, buffer: bytearray, offset: int, flags: int) -> None:
    _call(_disk().write, memoryview(buffer), offset, fua=bool(flags & nbdkit.FLAG_FUA))


def flush(_handle: bool, _flags: int) -> None:
    _call(_disk().flush)


def trim(_handle: bool, count: int, offset: int, flags: int) -> None:
    _call(_disk().trim, offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


def zero(_handle: bool, count: int, offset: int, flags: int) -> None:
    _call(
        _disk().zero,
        offset,
        count,
        may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
        fast_only=bool(flags & nbdkit.FLAG_FAST_ZERO),
        fua=bool(flags & nbdkit.FLAG_FUA),
    )


def cache(_handle: bool, count: int, offset: int, _flags: int) -> None:
    _call(_disk().cache, offset, count)


def extents(_handle: bool, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    limit = 1 if flags & nbdkit.FLAG_REQ_ONE else 256
    return [
        (
            extent.offset,
            extent.length,
            (nbdkit.EXTENT_HOLE if extent.hole else 0) | (nbdkit.EXTENT_ZERO if extent.zero else 0),
        )
        for extent in _call(_disk().block_status, offset, count, limit)
    ]
