# SPDX-License-Identifier: Apache-2.0
"""What may stand behind ``-b`` or in an image's header: backing URIs, any text.

Accepts, or raises UsageError or BackingError. Nothing is started: what would be is only named.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from fuzz.patches import patched
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.backing import sources
from nbdstream.backing.formats import FORMATS
from nbdstream.backing.plugins import PLUGINS
from nbdstream.errors import BackingError, UsageError

DIRECTORY = Path("/nowhere")


def run(data: bytes) -> object:
    source = Source(data)
    image_format = source.choice(("raw", "qcow2", "", "vmdk", "raw "))
    text = source.rest().decode("utf-8", "surrogateescape")
    uri = sources.anchored(text, DIRECTORY)
    assert sources.anchored(uri, Path("/elsewhere")) == uri
    named, kind = sources.recorded_by_image(text)
    assert kind in ("raw", *FORMATS.values()) and len(named) <= len(text)
    outcome = [uri, named, kind]
    try:
        outcome.append(sources.named_by_image("/images/disk.qcow2", text, image_format))
    except UsageError as error:
        outcome.append(str(error))
    # An unknown kind is answered with those that are known, which asks nbdkit for its plugins.
    with patched(sources, has_plugin=lambda _name: True):
        sources._serve(uri)
    for plugin in PLUGINS.values():
        try:
            outcome.extend(plugin.told(uri, urlsplit(uri)).parameters)
        except (UsageError, BackingError) as error:
            outcome.append(str(error))
    return outcome


def seeds() -> Iterator[bytes]:
    for text in (
        "nbd://localhost/x",
        "qcow2+https://user:pass@host/path/disk.qcow2?a=b",
        "qcow2+vmdk+file:///a%20b",
        "ssh://me@host:22/images/x.raw",
        "s3://bucket/key",
        "file://localhost/etc/nothing",
        "relative/path.raw",
        "json:{}",
        "nbd+unix:///?socket=a",
    ):
        yield b"\0" + text.encode()


TARGET = Target("sources", run, (UsageError, BackingError), seeds)
