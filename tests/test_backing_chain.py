# SPDX-License-Identifier: Apache-2.0
"""Backings of several images, each on the next, and plugins of nbdkit's by their names."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstream.backing import Priority, open_backing, recorded_by_image
from nbdstream.backing.sources import anchored, chain
from nbdstream.errors import BackingError, UsageError
from nbdstream.service import ServeOptions, open_stream
from nbdstream.text import redacted, redacted_text
from testbed import peers

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(scope="module")
def images() -> Iterator[Path]:
    """``base.raw`` and, one on the other, ``day1.qcow2``, ``day2.qcow2``; ``whole.raw`` is what
    the last of them shows."""
    with peers.temporary_directory() as directory:
        peers.make_image(directory / "base.raw", SIZE, seed=5)
        below = ("base.raw", "raw")
        for day, (offset, pattern) in enumerate([(1 * MIB, 0x11), (2 * MIB, 0x22)], 1):
            top = directory / f"day{day}.qcow2"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", below[0], "-F", below[1]]
            peers.run([*create, top])
            write = f"write -P {pattern} {offset} 300k"
            peers.run(["qemu-io", "-f", "qcow2", "-c", write, "-c", "write -z 0 64k", top])
            below = (top.name, "qcow2")
        peers.run(["qemu-img", "convert", "-O", "raw", top, directory / "whole.raw"])
        yield directory


async def content_of(uri: str) -> bytes:
    async with open_backing(uri) as backing:
        data = bytearray(backing.size)
        await backing.read(memoryview(data), 0, Priority.DEMAND)
        return bytes(data)


def of(directory: Path, *names: str) -> str:
    """The chain of these files, the top first."""
    formats = {".qcow2": "qcow2+", ".raw": ""}
    return " on ".join(f"{formats[Path(name).suffix]}{directory / name}" for name in names)


async def test_a_chain_of_files(images: Path) -> None:
    uri = of(images, "day2.qcow2", "day1.qcow2", "base.raw")
    assert await content_of(uri) == (images / "whole.raw").read_bytes()


async def test_a_chain_over_nbd(images: Path) -> None:
    with (
        peers.nbdkit("file", images / "day2.qcow2") as top,
        peers.nbdkit("file", images / "day1.qcow2") as middle,
    ):
        uri = f"qcow2+{top.uri} on qcow2+{middle.uri} on {images}/base.raw"
        assert await content_of(uri) == (images / "whole.raw").read_bytes()


@pytest.mark.parametrize("leaf_format", ["raw", "qcow2", "qed"])
async def test_a_leaf_on_a_chain_is_served_again(
    images: Path, tmp_path: Path, leaf_format: str
) -> None:
    leaf = tmp_path / f"leaf.{leaf_format}"
    uri = of(images, "day2.qcow2", "day1.qcow2", "base.raw")
    for named in (uri, None):
        options = ServeOptions(leaf=str(leaf), backing=named, stream="off")
        async with open_stream(options) as service:
            assert service.disk.backing is not None
            assert service.disk.backing.uri == uri
    assert recorded_by_image(uri) == (uri, "raw")


async def test_an_image_on_the_wrong_one(images: Path) -> None:
    with pytest.raises(BackingError, match="name that one, too"):
        await content_of(of(images, "day2.qcow2"))
    with pytest.raises(BackingError, match="name that one, too"):
        await content_of(of(images, "day2.qcow2", "day1.qcow2"))
    with pytest.raises(UsageError, match="only an image in a format"):
        await content_of("nbd://localhost/a on qcow2+nbd://localhost/b")


async def test_an_image_without_a_backing_is_on_nothing(images: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.qcow2"
    peers.run(["qemu-img", "create", "-q", "-f", "qcow2", alone, "4M"])
    with pytest.raises(BackingError, match="has no backing file"):
        await content_of(f"qcow2+{alone} on {images}/base.raw")


def test_a_file_with_the_word_in_its_name(tmp_path: Path) -> None:
    assert chain("debian on btrfs.raw") == ["debian on btrfs.raw"]
    assert anchored("debian on btrfs.raw", tmp_path) == f"{tmp_path}/debian on btrfs.raw"
    assert anchored("qcow2+a on b", tmp_path) == f"qcow2+{tmp_path}/a on {tmp_path}/b"


# --- nbdkit:PLUGIN ----------------------------------------------------------------------


async def test_a_plugin_by_its_name() -> None:
    whole = await content_of("nbdkit:pattern?size=1M")
    assert len(whole) == MIB
    assert whole[8:16] == (8).to_bytes(8, "big")


async def test_a_filter_and_a_format_above_a_plugin(images: Path, tmp_path: Path) -> None:
    packed = tmp_path / "day2.qcow2.xz"
    peers.run(
        ["qemu-img", "convert", "-O", "qcow2", images / "day2.qcow2", tmp_path / "day2.qcow2"]
    )
    peers.run(["xz", "-k", tmp_path / "day2.qcow2"])
    uri = f"qcow2+nbdkit:file?file={packed}&filter=xz"
    assert await content_of(uri) == (images / "whole.raw").read_bytes()


async def test_a_script_may_run_programs_and_not_write_where_it_likes(tmp_path: Path) -> None:
    script, written = tmp_path / "disk.sh", Path("/var/tmp/nbdstream-written-by-a-plugin")
    script.write_text(
        "#!/bin/sh\n"
        "case $1 in\n"
        f"get_size) (echo no >{written}) 2>/dev/null; expr 512 + 512 ;;\n"
        "pread) head -c $3 /dev/zero | tr '\\0' x ;;\n"
        "*) exit 2 ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    assert await content_of(f"nbdkit:sh?script={script}") == b"x" * 1024
    assert not written.exists()  # noqa: ASYNC240


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nbdkit:", "wanted: nbdkit:PLUGIN"),
        ("nbdkit:file?", "file"),
        ("nbdkit:file?novalue", "wanted: nbdkit:PLUGIN"),
        ("nbdkit:no-such-plugin?a=b", "no working no-such-plugin plugin"),
        ("nbdkit:memory?filter=no-such-filter&size=1M", "no-such-filter"),
    ],
)
async def test_a_plugin_that_cannot_be_run(uri: str, words: str) -> None:
    with pytest.raises((BackingError, UsageError), match=words) as caught:
        await content_of(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("leaf_format", ["raw", "qcow2"])
async def test_a_leaf_does_not_choose_what_is_run(tmp_path: Path, leaf_format: str) -> None:
    leaf = str(tmp_path / f"leaf.{leaf_format}")
    uri = "nbdkit:pattern?size=1M"
    for _ in range(2):
        async with open_stream(ServeOptions(leaf=leaf, backing=uri, stream="off")):
            pass
    with pytest.raises(UsageError, match="runs a program: name it with -b"):
        async with open_stream(ServeOptions(leaf=leaf, stream="off")):
            pass


def test_a_plugins_secrets_are_not_shown() -> None:
    uri = "nbdkit:vddk?file=a&password=geheim"
    assert redacted(uri) == "nbdkit:vddk?file=a&password=***"
    assert "geheim" not in redacted_text(f"cannot open qcow2+{uri} now")
    assert os.sep not in redacted(uri)
