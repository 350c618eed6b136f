# SPDX-License-Identifier: Apache-2.0
"""The seal beside a leaf: `read_seal` takes a file with any content.

Accepts, or raises LeafFormatError. What is accepted comes back when it is written and read
again, and names a generation that its export's URI names.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

from fuzz.files import scratch
from fuzz.target import Target
from nbdstream.errors import LeafFormatError
from nbdstream.handover.seal import SUFFIX, read_seal, write_seal


def run(data: bytes) -> object:
    leaf = scratch("seal")
    record = leaf.with_name(leaf.name + SUFFIX)
    record.write_bytes(data)
    seal = read_seal(str(leaf))
    assert seal is not None, "a leaf with a record is sealed"
    unstamped = replace(seal, stamp="")
    write_seal(str(leaf), unstamped)
    assert read_seal(str(leaf)) == unstamped
    return seal


def seeds() -> Iterator[bytes]:
    values = {"generation": "0123456789abcdef", "export": "disk@0123456789abcdef"}
    yield json.dumps({**values, "listen": "unix:/run/x"}).encode()
    yield json.dumps({**values, "listen": "h:1", "stamp": "", "format": "qcow2"}).encode()
    yield json.dumps({**values, "listen": "h:1", "stamp": "5 5", "format": "raw"}).encode()


TARGET = Target("seal", run, (LeafFormatError,), seeds)
