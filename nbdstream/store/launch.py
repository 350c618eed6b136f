# SPDX-License-Identifier: Apache-2.0
"""Starts the process of an image when its first user comes, or when one finds it gone.

Those who find no process take the lock ``start`` one after the other, and the first of them
starts one. The new process itself waits for the lock ``serving``, which its predecessor may
hold until it has closed the leaf. Its URI, which may hold secrets, goes to it by a pipe.
"""

import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from nbdstream.errors import BackingError, BackingGoneError, StoreError
from nbdstream.net.address import UnixAddress
from nbdstream.net.connect import open_socket
from nbdstream.store.layout import Image
from nbdstream.store.locks import acquire
from nbdstream.tasks import in_worker

# Seconds that another process may take to start the image's process.
START_TIMEOUT = 60.0


def waker(image: Image, uri: str) -> Callable[[], Awaitable[None]]:
    """What makes sure that an image's process runs. It raises BackingGoneError if it cannot be
    started now; ``uri`` is where the image is, with secrets."""
    return partial(_wake, image, uri)


async def _wake(image: Image, uri: str) -> None:
    if await _answers(image):
        return
    try:
        lock = await in_worker(
            lambda: acquire(image.start, timeout=START_TIMEOUT), abandon_on_cancel=False
        )
        with lock:
            if not await _answers(image):
                await _start(image, uri)
    except FileNotFoundError as error:
        raise BackingError(f"image {image.id} is not in the store any more") from error
    except (StoreError, OSError) as error:
        text = f"image {image.id}: its process cannot be started: {error}"
        raise BackingGoneError(text) from error


async def _answers(image: Image) -> bool:
    """Whether the image's process accepts connections."""
    try:
        sock = await open_socket(UnixAddress(str(image.socket)))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    sock.close()
    return True


async def _start(image: Image, uri: str) -> None:
    """Start the process, which leaves us for good once it accepts connections."""
    store = image.directory.parent.parent
    command = [sys.executable, "-m", "nbdstream", "image", "serve", image.id]
    done: subprocess.CompletedProcess[bytes] = await trio.run_process(
        [*command, "--store", str(store), "--uri", "-", "--detach"],
        stdin=f"{uri}\n".encode(),
        capture_stderr=True,
        capture_stdout=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        words = lines[-1] if lines else f"exit status {done.returncode}"
        raise StoreError(words.removeprefix("nbdstream: error: "))
