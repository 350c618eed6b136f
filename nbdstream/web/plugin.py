# SPDX-License-Identifier: Apache-2.0
"""nbdkit's callbacks for an image on a web server.

The one parameter, ``config``, is the path of a file in JSON: ``url``; ``settings``, the path of the
user's file, or ""; ``state``, the number of a descriptor that is open for writing. It is a file, as
a command line can be read by every user of the host.
"""

import errno
import json
from pathlib import Path

import nbdkit  # provided by nbdkit itself

from nbdstream.web.errors import WebError
from nbdstream.web.image import Keeper, RemoteImage
from nbdstream.web.transfers import Transfers

_transfers: Transfers | None = None
_image: RemoteImage | None = None


def config(key: str, value: str) -> None:
    """Take nbdkit's parameter ``config``, the path of a JSON file.

    Raises RuntimeError (another parameter), OSError, ValueError; nbdkit does not start then.
    """
    global _image
    if key != "config":
        raise RuntimeError(f"unknown parameter {key}")
    told = json.loads(Path(value).read_text())
    _image = RemoteImage(told["url"], told["settings"], _running, Keeper(told["state"]))


def config_complete() -> None:
    """Raises RuntimeError if there was no parameter ``config``."""
    if _image is None:
        raise RuntimeError("wanted: config=FILE")


def after_fork() -> None:
    """Start libcurl's thread; a thread does not survive a fork."""
    global _transfers
    _transfers = Transfers(_the_image().connections)
    _transfers.start()


def _running() -> Transfers:
    assert _transfers is not None
    return _transfers


def _the_image() -> RemoteImage:
    assert _image is not None
    return _image


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> RemoteImage:  # noqa: A001 - the name is nbdkit's
    image = _the_image()
    image.ready()
    return image


def get_size(image: RemoteImage) -> int:
    return image.size


def can_write(image: RemoteImage) -> bool:
    return False


def can_multi_conn(image: RemoteImage) -> bool:
    return True


def pread(image: RemoteImage, buffer: bytearray, offset: int, flags: int) -> None:
    try:
        image.read(memoryview(buffer), offset)
    except WebError:
        nbdkit.set_error(errno.EIO)
        raise
