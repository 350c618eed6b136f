# SPDX-License-Identifier: Apache-2.0
"""Makers of images that try to read what is not theirs, to hang the reader, or to grow.

Each maker takes the path of a file of the host, which the image must not get at.
"""

import struct
from collections.abc import Callable

MIB = 1 << 20
WORDS = b"the canary sings. "


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
