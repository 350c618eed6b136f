# SPDX-License-Identifier: Apache-2.0
"""Images that strangers wrote, made to read what is not theirs, to hang, or to grow.

A *canary* is a file of the host that only the image names. Whatever an image says, the
canary's words never reach a client, the log, or an error message.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from nbdstream.backing import Priority, confine, formats, open_backing
from nbdstream.errors import BackingError, LeafError, NbdstreamError, UsageError
from nbdstream.leaf import open_leaf
from testbed import peers
from testbed.processes import children
from tests.hostile_images import HOSTILE, MIB, WORDS, Made, qcow2

SECONDS = 60

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file of the host, in a directory that no image lies in."""
    path = tmp_path / "private" / "canary"
    path.parent.mkdir()
    path.write_bytes((WORDS * (MIB // len(WORDS) + 1))[:MIB])
    return path


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 30


async def refusal(uri: str) -> str:
    """The one line with which a backing is refused."""
    with trio.fail_after(SECONDS):
        with pytest.raises((BackingError, UsageError)) as caught:
            async with open_backing(uri):
                pass
    return str(caught.value)


@pytest.mark.parametrize("way", ["file", "nbd"])
@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_image_is_refused_as_a_backing(
    made: Made, way: str, canary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_format, content = made(os.fsencode(canary))
    image = tmp_path / "image"
    image.write_bytes(content)
    if way == "file":
        message = await refusal(f"{image_format}+{image}")
    else:
        with peers.nbdkit("file", image) as peer:
            message = await refusal(f"{image_format}+{peer.uri}")
    assert WORDS.decode() not in message + caplog.text


@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
async def test_the_sandbox_alone_keeps_the_canary(
    made: Made, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may look harmless when it is inspected and show another header to qemu-nbd. So
    here nothing is inspected: what the image gives away then is what the sandbox lets it."""

    async def looks_harmless(*_: object) -> None:
        pass

    monkeypatch.setattr("nbdstream.backing.sources.inspect", looks_harmless)
    image_format, content = made(os.fsencode(canary))
    image = tmp_path / "image"
    image.write_bytes(content)
    with trio.fail_after(SECONDS):
        try:
            async with open_backing(f"{image_format}+{image}", timeout=0.1) as backing:
                data = bytearray(min(backing.size, 2 * MIB))
                try:
                    await backing.read(memoryview(data), 0, Priority.DEMAND)
                finally:
                    assert WORDS not in data
                    assert b"root:" not in data
        except NbdstreamError:
            pass


NAMING = ["qcow2: absolute backing file", "qcow2: raw external data file", "qcow2: json: data file"]


async def _first_mebibyte(uri: str) -> bytes:
    """What a client would get of an image, or nothing if it is refused or never answers."""
    data = bytearray(MIB)
    try:
        with trio.fail_after(SECONDS):
            async with open_backing(uri, timeout=0.1) as backing:
                await backing.read(memoryview(data), 0, Priority.DEMAND)
    except NbdstreamError:
        return b""
    return bytes(data)


@pytest.mark.parametrize("name", NAMING)
async def test_an_image_that_shows_another_header_the_second_time(
    name: str, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Harmless while it is inspected; hostile when qemu-nbd opens it."""
    image = tmp_path / "image"
    image.write_bytes(qcow2())

    async def inspect_and_swap(*arguments: Any, **named: Any) -> None:
        await formats.inspect(*arguments, **named)
        image.write_bytes(HOSTILE[name](os.fsencode(canary))[1])

    monkeypatch.setattr("nbdstream.backing.sources.inspect", inspect_and_swap)
    with peers.nbdkit("file", image) as peer:
        assert WORDS not in await _first_mebibyte(f"qcow2+{peer.uri}")
    assert image.read_bytes() != qcow2()


@pytest.mark.parametrize("name", NAMING)
async def test_an_image_that_turns_hostile_before_a_helper_is_started_again(
    name: str, canary: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(qcow2())
    before = children(os.getpid())
    with peers.nbdkit("file", image) as peer, trio.fail_after(SECONDS):
        async with open_backing(f"qcow2+{peer.uri}", timeout=0.1) as backing:
            confined = backing.statistics().sandbox
            assert "Landlock" in confined or "namespaces" in confined
            image.write_bytes(HOSTILE[name](os.fsencode(canary))[1])
            (helper,) = children(os.getpid()) - before - {peer.pid}
            os.kill(helper, signal.SIGKILL)
            while not children(os.getpid()) - before - {peer.pid, helper}:  # noqa: ASYNC110
                await trio.sleep(0.01)
            data = bytearray(MIB)
            with contextlib.suppress(NbdstreamError):
                await backing.read(memoryview(data), 0, Priority.DEMAND)
            assert WORDS not in data


@pytest.mark.parametrize(
    "name",
    ["qcow2: absolute backing file", "vmdk: absolute flat extent", "qcow2: raw external data file"],
)
def test_the_canary_sings_where_nothing_is_confined(
    name: str, canary: Path, tmp_path: Path
) -> None:
    """The test above can fail: QEMU by itself opens what these images name."""
    image_format, content = HOSTILE[name](os.fsencode(canary))
    image = tmp_path / "image"
    image.write_bytes(content)
    command = ["strace", "-f", "-e", "trace=openat", "qemu-io", "-r", "-f", image_format]
    done = subprocess.run(
        [*command, "-c", "read 0 512", str(image)], capture_output=True, text=True, check=False
    )
    assert str(canary) in done.stderr


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
@pytest.mark.parametrize("prefix", ["", "qcow2+"])
async def test_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, prefix: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "image")
    assert "neither a file nor a block device" in await refusal(f"{prefix}{tmp_path}/image")


@pytest.mark.parametrize("prefix", ["", "qcow2+"])
async def test_a_device_is_refused(prefix: str) -> None:
    assert "neither a file" in await refusal(f"{prefix}/dev/zero")


@pytest.mark.parametrize("uri", ["a\0b", "qcow2+a\0b", "ssh://h:99999/x", "qcow2+https://[::1/x"])
async def test_a_uri_that_makes_no_sense_is_refused(uri: str) -> None:
    assert re.search("NUL|makes? no sense", await refusal(uri))


async def test_without_any_confinement_a_foreign_format_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(qcow2())
    script = Path(confine.__file__).read_text()  # noqa: ASYNC240
    for name in ("_landlock_version() -> int:", "_succeeds(step: Callable[[], None]) -> bool:"):
        assert name in script
        script = script.replace(f"def {name}\n", f"def {name}\n    return 0\n")
    poor = tmp_path / "confine.py"
    poor.write_text(script)
    monkeypatch.setattr(confine, "__file__", str(poor))
    assert "neither Landlock nor user namespaces" in await refusal(f"qcow2+{image}")


# -- as a leaf -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disk", "disk.qcow2", "disk.qed", "disk.img", "disk.bin"])
@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_image_as_a_leaf_chooses_nothing(
    made: Made, name: str, canary: Path, tmp_path: Path
) -> None:
    """It is refused, opened as raw bytes, or opened in the format that its name says; a
    backing that it names is not used without the user's word."""
    _, content = made(os.fsencode(canary))
    image = tmp_path / name
    image.write_bytes(content)
    try:
        leaf = open_leaf(str(image), read_only=True)
    except (LeafError, OSError):
        return
    assert leaf.format in (image.suffix[1:], "raw")
    named = leaf.backing
    leaf.close()
    if named is not None:
        done = _serve(image)
        assert done.returncode in (1, 2)
        assert WORDS.decode() not in done.stdout + done.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stderr)
        assert done.stderr.count("\n") == 1


def _serve(image: Path) -> subprocess.CompletedProcess[str]:
    command = [peers.binary("NBDSTREAM"), "serve", str(image), "--run", "true"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
