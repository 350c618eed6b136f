# SPDX-License-Identifier: Apache-2.0
"""What the tests of backings share: an image, reading it, and what a backing says at open.

A test module makes fixtures of the first two: ``image = pytest.fixture(image_file,
scope="module")``, ``content = pytest.fixture(content_of, scope="module")``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from nbdstream.backing import Backing, Priority, open_backing
from nbdstream.errors import BackingError, UsageError
from testbed.peers import make_image, temporary_directory

MIB = 1 << 20
SIZE = 6 * MIB + 512


def image_file() -> Iterator[Path]:
    """A raw image, in a path that has to be quoted in URIs."""
    with temporary_directory() as directory:
        path = directory / "image with spaces"
        make_image(path, SIZE, seed=1)
        yield path


def content_of(image: Path) -> bytes:
    return image.read_bytes()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells of. Fails when it takes absurdly long."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def read(
    backing: Backing, offset: int, length: int, priority: Priority = Priority.DEMAND
) -> bytes:
    data = bytearray(length)
    await backing.read(memoryview(data), offset, priority)
    return bytes(data)


async def opens_with(uri: str) -> str:
    """The one line with which a backing is refused."""
    with pytest.raises((BackingError, UsageError)) as caught, trio.fail_after(20):
        async with open_backing(uri):
            pass
    message = str(caught.value)
    assert "\n" not in message
    return message
