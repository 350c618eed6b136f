# SPDX-License-Identifier: Apache-2.0
"""Images that strangers wrote, made to read what is not theirs, to hang, or to grow.

A *canary* is a file of the host that nobody named but the image. Whatever an image says, the
canary's words never reach a client, the log, or an error message.
"""

import contextlib
import os
import re
import signal
import struct
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

MIB = 1 << 20
WORDS = b"the canary sings. "
SECONDS = 60

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file of the host, in a directory that no image lies in."""
    path = tmp_path / "private" / "canary"
    path.parent.mkdir()
    path.write_bytes((WORDS * (MIB // len(WORDS) + 1))[:MIB])
    return path


# -- images, as bytes ----------------------------------------------------------------------


def qcow2(
    *,
    name: bytes = b"",
    extensions: tuple[tuple[int, bytes], ...] = (),
    version: int = 3,
    **fields: int,
) -> bytes:
    """A qcow2 image of 1 MiB without any data: header, refcounts, L1 table."""
    values = {
        "cluster_bits": 16,
        "size": MIB,
        "crypt_method": 0,
        "l1_size": 1,
        "l1_table_offset": 3 << 16,
        "refcount_table_offset": 1 << 16,
        "refcount_table_clusters": 1,
        "nb_snapshots": 0,
        "snapshots_offset": 0,
        "incompatible": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "header_length": 104,
        "l1_entry": 0,
    } | fields
    area = b"".join(
        struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        for kind, data in extensions
    ) + bytes(8)
    offset = 104 + len(area) if name else 0
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        version,
        values.get("name_offset", offset),
        values.get("name_length", len(name)),
        values["cluster_bits"],
        values["size"],
        values["crypt_method"],
        values["l1_size"],
        values["l1_table_offset"],
        values["refcount_table_offset"],
        values["refcount_table_clusters"],
        values["nb_snapshots"],
        values["snapshots_offset"],
        values["incompatible"],
        values["compatible"],
        values["autoclear"],
        values["refcount_order"],
        values["header_length"],
    )
    image = bytearray(4 << 16)
    head = header + area + name
    image[: len(head)] = head
    struct.pack_into(">Q", image, 1 << 16, 2 << 16)
    struct.pack_into(">4H", image, 2 << 16, 1, 1, 1, 1)
    struct.pack_into(">Q", image, 3 << 16, values["l1_entry"])
    return bytes(image)


BACKING_FORMAT, DATA_FILE = 0xE2792ACA, 0x44415441


def qed(name: bytes = b"", **fields: int) -> bytes:
    """A QED image of 1 MiB without any data."""
    values = {"cluster_size": 65536, "table_size": 4, "header_size": 1, "size": MIB} | fields
    header = struct.pack(
        "<4sIIIQQQQQII",
        b"QED\0",
        values["cluster_size"],
        values["table_size"],
        values["header_size"],
        (5 if name else 0),
        0,
        0,
        values.get("l1", 65536),
        values["size"],
        64,
        len(name),
    )
    return (header + name).ljust(6 * 65536, b"\0")


def qcow1(name: bytes = b"", cluster_bits: int = 12, l2_bits: int = 9) -> bytes:
    """A version 1 image."""
    header = struct.pack(
        ">4sIQIIQBBHIQ", b"QFI\xfb", 1, 48 if name else 0, len(name), 0, MIB, cluster_bits,
        l2_bits, 0, 0, 4096,
    )  # fmt: skip
    return (header + name).ljust(8192, b"\0")


def vmdk_descriptor(extent: str, kind: str, parent: str = "ffffffff", hint: str = "") -> bytes:
    lines = [
        "# Disk DescriptorFile", "version=1", "CID=fffffffe", f"parentCID={parent}",
        f'createType="{kind}"', hint, extent, 'ddb.adapterType = "ide"',
    ]  # fmt: skip
    return "\n".join(lines).encode().ljust(4096, b"\0")


def vmdk_sparse(capacity: int, descriptor: bytes = b"") -> bytes:
    """A hosted sparse extent; with capacity 0 QEMU believes the descriptor in it."""
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, capacity, 128, 1, 20, 512, 0, 21, 128)
    return header.ljust(512, b"\0") + descriptor.ljust(1 << 17, b"\0")


def vdi(**fields: int) -> bytes:
    header = bytearray(512)
    header[:39] = b"<<< Oracle VM VirtualBox Disk Image >>>"
    struct.pack_into("<IIII", header, 64, 0xBEDA107F, 0x10001, 400, fields.get("type", 1))
    struct.pack_into("<II", header, 340, 512, 1024)
    struct.pack_into("<Q", header, 368, fields.get("size", MIB))
    struct.pack_into("<IIII", header, 376, fields.get("block", MIB), 0, fields.get("blocks", 1), 0)
    return bytes(header).ljust(8192, b"\xff")


def vpc(kind: int, size: int = MIB) -> bytes:
    footer = bytearray(512)
    struct.pack_into(">8sIIQ", footer, 0, b"conectix", 2, 0x10000, 512)
    struct.pack_into(">QQ", footer, 40, size, size)
    struct.pack_into(">HBBI", footer, 56, 65535, 16, 255, kind)
    struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
    return bytes(footer) + bytes(MIB) + bytes(footer)


def parallels(**fields: int) -> bytes:
    header = struct.pack(
        "<16sIIIIIQIII", b"WithouFreSpacExt", 2, 16, 64, fields.get("tracks", 2048),
        fields.get("bat", 1), 2048, 0x746F6E59, 2, 0,
    )  # fmt: skip
    return header.ljust(65536, b"\0")


Made = Callable[[bytes], tuple[str, bytes]]


def _named(image_format: str, make: Callable[[bytes], bytes]) -> Made:
    return lambda canary: (image_format, make(canary))


def _json(canary: bytes) -> bytes:
    return b'json:{"driver":"raw","file":{"driver":"file","filename":"' + canary + b'"}}'


# What a hostile image is called here -> its format and bytes, given the canary's path.
HOSTILE: dict[str, Made] = {
    "qcow2: absolute backing file": _named(
        "qcow2", lambda c: qcow2(name=c, extensions=((BACKING_FORMAT, b"raw"),))
    ),
    "qcow2: backing file, format guessed": _named("qcow2", lambda c: qcow2(name=c)),
    "qcow2: relative backing file": _named("qcow2", lambda _: qcow2(name=b"private/canary")),
    "qcow2: climbing backing file": _named(
        "qcow2", lambda _: qcow2(name=b"../" * 40 + b"etc/passwd")
    ),
    "qcow2: json: backing": _named("qcow2", lambda c: qcow2(name=_json(c))),
    "qcow2: nbd:// backing": _named("qcow2", lambda _: qcow2(name=b"nbd://127.0.0.1:1/x")),
    "qcow2: fat: backing": _named("qcow2", lambda c: qcow2(name=b"fat:" + c.rpartition(b"/")[0])),
    "qcow2: host device backing": _named("qcow2", lambda _: qcow2(name=b"/dev/vda")),
    "qcow2: file: backing": _named("qcow2", lambda c: qcow2(name=b"file:" + c)),
    "qcow2: https backing": _named("qcow2", lambda _: qcow2(name=b"https://127.0.0.1:1/x")),
    "qcow2: backing name with escapes": _named(
        "qcow2", lambda _: qcow2(name=b"\x1b]0;owned\x07\nnbdstream: error: forged")
    ),
    "qcow2: external data file": _named(
        "qcow2", lambda c: qcow2(incompatible=4, extensions=((DATA_FILE, c),))
    ),
    "qcow2: raw external data file": _named(
        "qcow2", lambda c: qcow2(incompatible=4, autoclear=2, extensions=((DATA_FILE, c),))
    ),
    "qcow2: json: data file": _named(
        "qcow2", lambda c: qcow2(incompatible=4, extensions=((DATA_FILE, _json(c)),))
    ),
    "qcow2: data file without a name": _named("qcow2", lambda _: qcow2(incompatible=4)),
    "qcow2: AES": _named("qcow2", lambda _: qcow2(crypt_method=1)),
    "qcow2: LUKS without its header": _named("qcow2", lambda _: qcow2(crypt_method=2)),
    "qcow2: clusters of 8 GiB": _named("qcow2", lambda _: qcow2(cluster_bits=33)),
    "qcow2: clusters of 1 byte": _named("qcow2", lambda _: qcow2(cluster_bits=0)),
    "qcow2: a huge L1 table": _named("qcow2", lambda _: qcow2(l1_size=0xFFFFFFFF)),
    "qcow2: 8 EiB": _named("qcow2", lambda _: qcow2(size=1 << 63)),
    "qcow2: an L1 table that is too small": _named("qcow2", lambda _: qcow2(size=1 << 60)),
    "qcow2: a huge refcount table": _named(
        "qcow2", lambda _: qcow2(refcount_table_clusters=0xFFFFFFFF)
    ),
    "qcow2: refcounts of 2^31 bits": _named("qcow2", lambda _: qcow2(refcount_order=31)),
    "qcow2: an unaligned L1 table": _named("qcow2", lambda _: qcow2(l1_table_offset=12345)),
    "qcow2: 2^32 snapshots": _named(
        "qcow2", lambda _: qcow2(nb_snapshots=0xFFFFFFFF, snapshots_offset=1 << 16)
    ),
    "qcow2: an extension of 4 GiB": _named(
        "qcow2",
        lambda _: qcow2()[:104] + struct.pack(">II", 0x12345678, 0xFFFFFFF0) + qcow2()[112:],
    ),
    "qcow2: a header of 4 GiB": _named("qcow2", lambda _: qcow2(header_length=0xFFFFFFF8)),
    "qcow2: a name of 4 GiB": _named(
        "qcow2", lambda _: qcow2(name_offset=112, name_length=0xFFFFFFFF)
    ),
    "qcow2: unknown features": _named("qcow2", lambda _: qcow2(incompatible=1 << 40)),
    "qcow2: version 9": _named("qcow2", lambda _: qcow2(version=9)),
    "qed: backing file": _named("qed", qed),
    "qed: clusters of 2 GiB": _named("qed", lambda _: qed(cluster_size=1 << 31)),
    "qed: 8 EiB": _named("qed", lambda _: qed(size=(1 << 63) - 512)),
    "qed: an L1 table outside": _named("qed", lambda _: qed(l1=1 << 62)),
    "qcow: backing file": _named("qcow", qcow1),
    "qcow: absurd clusters": _named("qcow", lambda _: qcow1(cluster_bits=63, l2_bits=63)),
    "vmdk: absolute flat extent": _named(
        "vmdk",
        lambda c: vmdk_descriptor(f'RW 2048 FLAT "{c.decode()}" 0', "monolithicFlat"),
    ),
    "vmdk: absolute VMFS extent": _named(
        "vmdk", lambda c: vmdk_descriptor(f'RW 2048 VMFS "{c.decode()}"', "vmfs")
    ),
    "vmdk: several flat extents": _named(
        "vmdk",
        lambda c: vmdk_descriptor(
            f'RW 1024 FLAT "{c.decode()}" 0\nRW 1024 FLAT "{c.decode()}" 1024',
            "twoGbMaxExtentFlat",
        ),
    ),
    "vmdk: a parent's file name": _named(
        "vmdk",
        lambda c: vmdk_descriptor(
            f'RW 2048 FLAT "{c.decode()}" 0',
            "monolithicFlat",
            "12345678",
            f'parentFileNameHint="{c.decode()}"',
        ),
    ),
    "vmdk: a descriptor inside a sparse extent": _named(
        "vmdk",
        lambda c: vmdk_sparse(
            0, vmdk_descriptor(f'RW 2048 FLAT "{c.decode()}" 0', "monolithicFlat")
        ),
    ),
    "vmdk: 8 EiB": _named("vmdk", lambda _: vmdk_sparse(1 << 54)),
    "vdi: differencing": _named("vdi", lambda _: vdi(type=4)),
    "vdi: 2^32 blocks": _named("vdi", lambda _: vdi(blocks=0xFFFFFFFF, size=1 << 62)),
    "vpc: differencing": _named("vpc", lambda _: vpc(4)),
    "vhdx: nothing but a magic": _named("vhdx", lambda _: b"vhdxfile".ljust(MIB, b"\0")),
    "parallels: 2^32 tracks of nothing": _named(
        "parallels", lambda _: parallels(tracks=0, bat=0xFFFFFFFF)
    ),
}


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

    async def inspect_and_swap(*arguments: Any) -> None:
        await formats.inspect(*arguments)
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
