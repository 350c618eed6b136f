# SPDX-License-Identifier: Apache-2.0
"""qcow2 images in QEMU's hands: qemu-io, qemu-img, and a backing file that it finds."""

import json
import random
from pathlib import Path
from typing import Any

from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.header_file import read_header
from testbed.peers import run

SIZE = 3 << 20


def qemu_io(path: Path, *commands: str, options: str = "driver=qcow2") -> None:
    """Run qemu-io commands on an image without its backing."""
    arguments: list[str | Path] = ["qemu-io", "--image-opts"]
    for command in commands:
        arguments += ["-c", command]
    output = run([*arguments, f"{options},backing=,file.filename={path}"])
    assert "failed" not in output, output


def info(path: Path) -> dict[str, Any]:
    found = json.loads(run(["qemu-img", "info", "--output=json", path]))
    assert isinstance(found, dict)
    return found


def backing_file(tmp_path: Path) -> bytes:
    """A backing's content, also as the raw image base.raw."""
    content = random.Random(5).randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(content)
    return content


def local(tmp_path: Path) -> BackingReference:
    return BackingReference(str(tmp_path / "base.raw"), "raw", SIZE, "sha256:00")


def assert_same(path: Path, expected: bytes | bytearray) -> None:
    """``qemu-img compare``: the image, over its backing, against plain bytes."""
    (path.parent / "expected.raw").write_bytes(expected)
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw"]
    run([*command, path, path.parent / "expected.raw"])


def read_header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return read_header(file.fileno(), str(path))
